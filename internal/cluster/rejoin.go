package cluster

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// This file: a server of an earlier incarnation becomes part of the present one and
// stays who it is, with its replicas.

// Rejoin makes the server of a directory, which does not run, part of the present
// incarnation of its cluster. The member at the address is believed only if it
// shows the authority that the token pins. It returns where what was there before
// is kept. If it fails before it was admitted, nothing has changed.
func Rejoin(ctx context.Context, dir, address, tokenText, version string, now time.Time) (server *argonv1.Server, kept string, err error) {
	d := directory(dir)
	if err := d.settleStaged(); err != nil {
		return nil, "", err
	}
	id, creds, err := d.load()
	if err != nil {
		return nil, "", err
	}
	if id == nil {
		return nil, "", fmt.Errorf("directory %s is not that of a server of a cluster: start it and use `argon join`", d)
	}
	tok, err := parseToken(tokenText)
	if err != nil {
		return nil, "", err
	}
	if fingerprintOf(creds.ca) == tok.fingerprint {
		return nil, "", fmt.Errorf("server %s is of that incarnation of cluster %s already: start it", id.ServerName, id.ClusterName)
	}
	res, key, err := askAgain(ctx, id, creds, address, tok, version)
	if err != nil {
		return nil, "", err
	}
	staged := directory(d.recovering())
	defer func() { err = errors.Join(err, os.RemoveAll(string(staged))) }()
	if err := stageAnswer(staged, res, key, tok); err != nil {
		return nil, "", err
	}
	kept, err = d.settle(staged, now)
	return res.GetServer(), kept, err
}

// askAgain asks for admission with the key that the server has.
func askAgain(ctx context.Context, id *identity, creds *credentials, address string, tok token, version string) (*argonv1.AdmitResponse, crypto.Signer, error) {
	key, ok := creds.own.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("a key of type %T cannot sign", creds.own.PrivateKey)
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make a certificate request: %w", err)
	}
	s := &argonv1.Server{Meta: &argonv1.Meta{Id: id.ServerID, Name: id.ServerName}, Version: version}
	place(s, id.Address, id.Ports)
	res, err := askAdmission(ctx, address, tok, &argonv1.AdmitRequest{
		Token: tok.String(), CertificateRequest: request, Server: s,
		FormerCertificatePem: string(encodeCertificate(creds.own.Leaf)),
	})
	if err != nil {
		return nil, nil, err
	}
	if res.GetCluster().GetId() != id.ClusterID || res.GetServer().GetMeta().GetId() != id.ServerID {
		return nil, nil, fmt.Errorf("%s admitted this server as another one: remove that with `argon server rm %s`, and bring the server at %s up to date", address, res.GetServer().GetMeta().GetName(), address)
	}
	return res, key, nil
}

// stageAnswer makes the identity that the answer gives.
func stageAnswer(staged directory, res *argonv1.AdmitResponse, key crypto.Signer, tok token) error {
	if err := os.RemoveAll(string(staged)); err != nil {
		return fmt.Errorf("clear the directory of an earlier recovery: %w", err)
	}
	if err := os.Mkdir(string(staged), 0o700); err != nil {
		return fmt.Errorf("make the directory %s: %w", filepath.Base(string(staged)), err)
	}
	if _, err := staged.keepAnswer(res, key, tok); err != nil {
		return err
	}
	if err := staged.saveSuccessions(res.GetCluster()); err != nil {
		return err
	}
	id := newIdentity(res.GetCluster(), res.GetServer())
	id.Endpoints = res.GetEtcdEndpoints()
	return staged.saveIdentity(id)
}

// formerSelf is the record of the server that asks for admission and shows that it
// was part of an earlier incarnation; nil if it shows nothing. The record may be
// one that there is not any more, or not yet: then it has no revision.
func formerSelf(req *argonv1.AdmitRequest, c *argonv1.Cluster, servers []*argonv1.Server) (*argonv1.Server, error) {
	if req.GetFormerCertificatePem() == "" {
		return nil, nil
	}
	cert, err := parseCertificate([]byte(req.GetFormerCertificatePem()))
	if err != nil {
		return nil, fmt.Errorf("the certificate of an earlier incarnation: %w", err)
	}
	who, err := verifyFormer(cert, c)
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(req.GetCertificateRequest())
	if err != nil || !samePublicKey(csr.PublicKey, cert.PublicKey) {
		return nil, errors.New("the certificate of an earlier incarnation is of another key than the request")
	}
	for _, s := range servers {
		if s.GetMeta().GetId() != who.ID {
			continue
		}
		if s.GetCertificateSerial() != who.Serial {
			return nil, fmt.Errorf("server %s has come back already with another certificate: remove it with `argon server rm` and join anew", s.GetMeta().GetName())
		}
		return s, nil
	}
	return &argonv1.Server{Meta: &argonv1.Meta{Id: who.ID}}, nil
}

func verifyFormer(cert *x509.Certificate, c *argonv1.Cluster) (Identity, error) {
	for _, text := range c.GetFormerCaCertificatesPem() {
		ca, err := parseCertificate([]byte(text))
		if err != nil {
			return Identity{}, fmt.Errorf("an authority of an earlier incarnation: %w", err)
		}
		if who, err := verifyServer(cert, ca); err == nil {
			return who, nil
		}
	}
	return Identity{}, fmt.Errorf("the server was not part of an earlier incarnation of cluster %s: empty its directory and use `argon join`", c.GetName())
}

// returned is the record of a server that comes back: who it was, where it is now.
func returned(former, now *argonv1.Server) *argonv1.Server {
	if former.GetMeta().GetRevision() == 0 {
		now.Meta.Id = former.GetMeta().GetId()
		return now
	}
	s := proto.CloneOf(former)
	place(s, now.GetAddress(), Ports{
		API: int(now.GetApiPort()), Data: int(now.GetDataPort()), Peer: int(now.GetPeerPort()), Etcd: int(now.GetEtcdPort()),
	})
	s.Version, s.VoterRole, s.MemberId = now.GetVersion(), argonv1.VoterRole_VOTER_ROLE_CLIENT, 0
	return s
}
