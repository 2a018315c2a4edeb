package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// ErrToken: the token is no token, or is not good any more.
var ErrToken = errors.New("token refused")

const (
	tokenVersion = "argon1"
	// tokenIDBytes and tokenSecretBytes are random.
	tokenIDBytes     = 5
	tokenSecretBytes = 24
)

// token lets servers join, one unless its record says more. Its text is
// "argon1.<id>.<secret>.<fingerprint>": the id in hex; the secret and the
// SHA-256 of the authority's certificate in URL-safe base64 without padding.
type token struct {
	id          string
	secret      []byte
	fingerprint [sha256.Size]byte
}

func newToken(fingerprint [sha256.Size]byte) token {
	t := token{secret: make([]byte, tokenSecretBytes), fingerprint: fingerprint}
	id := make([]byte, tokenIDBytes)
	// Since Go 1.24 Read does not fail.
	_, _ = rand.Read(id)
	_, _ = rand.Read(t.secret)
	t.id = hex.EncodeToString(id)
	return t
}

func (t token) String() string {
	return strings.Join([]string{
		tokenVersion, t.id,
		base64.RawURLEncoding.EncodeToString(t.secret),
		base64.RawURLEncoding.EncodeToString(t.fingerprint[:]),
	}, ".")
}

// parseToken reads a token's text. ErrToken.
func parseToken(text string) (token, error) {
	const advice = "copy it whole from the output of `argon token create`"
	parts := strings.Split(strings.TrimSpace(text), ".")
	if len(parts) != 4 || parts[0] != tokenVersion {
		return token{}, fmt.Errorf("%w: it is not a token of Argon: %s", ErrToken, advice)
	}
	id, err := hex.DecodeString(parts[1])
	if err != nil || len(id) != tokenIDBytes {
		return token{}, fmt.Errorf("%w: its id is damaged: %s", ErrToken, advice)
	}
	strict := base64.RawURLEncoding.Strict()
	secret, err := strict.DecodeString(parts[2])
	if err != nil || len(secret) != tokenSecretBytes {
		return token{}, fmt.Errorf("%w: its secret is damaged: %s", ErrToken, advice)
	}
	fingerprint, err := strict.DecodeString(parts[3])
	if err != nil || len(fingerprint) != sha256.Size {
		return token{}, fmt.Errorf("%w: its fingerprint is damaged: %s", ErrToken, advice)
	}
	t := token{id: hex.EncodeToString(id), secret: secret, fingerprint: [sha256.Size]byte(fingerprint)}
	if t.String() != strings.TrimSpace(text) { // both decoders forgive more than one spelling
		return token{}, fmt.Errorf("%w: it is damaged: %s", ErrToken, advice)
	}
	return t, nil
}

// secretHash is what the catalog keeps of a secret. The secret is 192 random
// bits, so a plain hash is enough.
func (t token) secretHash() []byte {
	h := sha256.Sum256(t.secret)
	return h[:]
}

// check says why a token that was shown is not good. Who does not know the
// secret learns nothing about the token.
func (t token) check(rec *argonv1.Token, now time.Time) error {
	switch {
	case subtle.ConstantTimeCompare(t.secretHash(), rec.GetSecretHash()) != 1:
		return fmt.Errorf("%w: it is not one of this cluster, or was deleted: make one with `argon token create`", ErrToken)
	case rec.GetUsedBy() != "":
		return fmt.Errorf("%w: it was used already: make another with `argon token create`", ErrToken)
	case !now.Before(rec.GetExpires().AsTime()):
		return fmt.Errorf("%w: it expired at %s: make another with `argon token create`", ErrToken, rec.GetExpires().AsTime().UTC().Format(time.RFC3339))
	}
	return nil
}

// admit notes a server that the token lets in. It is used up by the last one.
func admit(rec *argonv1.Token, serverID string) {
	rec.Admitted = append(rec.Admitted, serverID)
	if len(rec.GetAdmitted()) >= int(rec.GetServers()) {
		rec.UsedBy = serverID
	}
}

// CheckToken says why a token does not let a server join. ErrToken.
func (m *Member) CheckToken(ctx context.Context, text string) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	tok, err := parseToken(text)
	if err != nil {
		return err
	}
	_, err = p.tokenRecord(ctx, tok, m.opts.Now())
	return err
}

// tokenRecord is the record of a token that is good. ErrToken.
func (p *parts) tokenRecord(ctx context.Context, tok token, now time.Time) (*argonv1.Token, error) {
	rec, err := p.store.Tokens.Get(ctx, tok.id)
	if errors.Is(err, catalog.ErrNotFound) {
		rec, err = &argonv1.Token{}, nil
	}
	if err != nil {
		return nil, err
	}
	return rec, tok.check(rec, now)
}

// CreateToken makes a token that lets some servers join within ttl. The text is
// not kept: only the hash of its secret is.
func (m *Member) CreateToken(ctx context.Context, servers uint32, ttl time.Duration) (string, *argonv1.Token, error) {
	p, err := m.running()
	if err != nil {
		return "", nil, err
	}
	if ttl <= 0 {
		return "", nil, fmt.Errorf("a token for %v: give a time above zero", ttl)
	}
	now := m.opts.Now()
	if err := p.dropOldTokens(ctx, now); err != nil {
		return "", nil, err
	}
	t := newToken(fingerprintOf(p.creds.ca))
	rec := &argonv1.Token{
		Id:         t.id,
		SecretHash: t.secretHash(),
		Created:    timestamppb.New(now),
		Expires:    timestamppb.New(now.Add(ttl)),
		Servers:    servers,
	}
	if err := p.store.Tokens.Create(ctx, rec); err != nil {
		return "", nil, fmt.Errorf("create a token: %w", err)
	}
	return t.String(), withoutHash(rec), nil
}

// tokenKept is how long a token that expired is still listed.
const tokenKept = 7 * 24 * time.Hour

// dropOldTokens forgets tokens, used or not, that expired long ago.
func (p *parts) dropOldTokens(ctx context.Context, now time.Time) error {
	list, err := p.store.Tokens.List(ctx)
	if err != nil {
		return err
	}
	for _, rec := range list {
		if now.Sub(rec.GetExpires().AsTime()) < tokenKept {
			continue
		}
		err := p.store.Tokens.Delete(ctx, rec)
		if err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return err
		}
	}
	return nil
}

// ListTokens lists all tokens, used and expired ones too, the oldest first.
func (m *Member) ListTokens(ctx context.Context) ([]*argonv1.Token, error) {
	p, err := m.running()
	if err != nil {
		return nil, err
	}
	list, err := p.store.Tokens.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, rec := range list {
		withoutHash(rec)
	}
	slices.SortFunc(list, func(a, b *argonv1.Token) int {
		return a.GetCreated().AsTime().Compare(b.GetCreated().AsTime())
	})
	return list, nil
}

// DeleteToken makes a token useless. catalog.ErrNotFound.
func (m *Member) DeleteToken(ctx context.Context, id string) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	rec, err := p.store.Tokens.Get(ctx, id)
	if err != nil {
		return err
	}
	return p.store.Tokens.Delete(ctx, rec)
}

// withoutHash keeps the hash out of what is shown.
func withoutHash(rec *argonv1.Token) *argonv1.Token {
	rec.SecretHash = nil
	return rec
}
