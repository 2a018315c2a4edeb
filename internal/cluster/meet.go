package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/api/argon/v1/argonv1connect"
	"github.com/argon-cluster/argon/internal/catalog"
)

// This file lets servers find each other where the records can't help: they have
// moved, and who would have to be told can't be reached. A server believes where
// another one is only from that one itself, by its certificate: it answers there,
// or it calls and says so. What third ones say are hints of where to look.

const (
	// introduceTimeout bounds one introduction.
	introduceTimeout = 3 * time.Second
	// seekPause is between two rounds of them while the catalog can't be reached,
	// introducePause between those of the leader to servers that are lost.
	seekPause      = time.Second
	introducePause = 5 * time.Second
	// introduceAtOnce bounds how many are under way.
	introduceAtOnce = 8
)

// remember keeps where the servers are for when the catalog can't be read.
func (m *Member) remember(servers []whereabouts) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.identity == nil {
		return nil
	}
	return m.rememberLocked(servers)
}

func (m *Member) rememberLocked(servers []whereabouts) error {
	endpoints := endpointsOf(servers)
	if slices.Equal(endpoints, m.identity.Endpoints) && slices.Equal(servers, m.identity.Servers) {
		return nil
	}
	changed := *m.identity
	changed.Endpoints, changed.Servers = endpoints, servers
	if err := m.dir.saveIdentity(&changed); err != nil {
		return err
	}
	m.identity = &changed
	return nil
}

// learn takes up where a server has shown that it is.
func (m *Member) learn(news whereabouts) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.identity == nil || news.ServerID == m.identity.ServerID {
		return nil
	}
	all, changed := learned(m.identity.Servers, news)
	if !changed {
		return nil
	}
	if err := m.rememberLocked(all); err != nil {
		return err
	}
	m.opts.Log.Info("a server of this cluster has shown where it is", "server", news.Name, "address", news.Address)
	if m.parts != nil {
		m.parts.client.SetEndpoints(m.endpointsLocked()...)
	}
	if m.learnedNews != nil {
		close(m.learnedNews)
		m.learnedNews = nil
	}
	return nil
}

// endpointsLocked are where this server looks for etcd: at those that it
// remembers, and at itself if it runs one. It needs mu held.
func (m *Member) endpointsLocked() []string {
	all := slices.Clone(m.identity.Endpoints)
	if own := urlString(m.identity.Address, m.identity.Ports.Etcd); m.runsEtcd() && !slices.Contains(all, own) {
		all = append(all, own)
	}
	return all
}

// whenLearned is closed when another server is known to be elsewhere.
func (m *Member) whenLearned() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.learnedNews == nil {
		m.learnedNews = make(chan struct{})
	}
	return m.learnedNews
}

// self is what this server says of itself.
func (id *identity) self() whereabouts {
	return whereabouts{ServerID: id.ServerID, Name: id.ServerName, Address: id.Address, Ports: id.Ports}
}

// Introduce hears from a server where it is, and tells it where others may be. who
// is whom the connection's certificate names.
func (m *Member) Introduce(who Identity, req *argonv1.IntroduceRequest) (*argonv1.IntroduceResponse, error) {
	id := m.about()
	if id.ServerID == "" {
		return nil, ErrUnconfigured
	}
	caller := whereaboutsFrom(req.GetSelf())
	if who.Kind != KindServer || who.ID != caller.ServerID || !reachable(caller.Address) {
		return nil, fmt.Errorf("server %q at %q: only a server says where it is, and only of itself", caller.ServerID, caller.Address)
	}
	if err := m.learn(caller); err != nil {
		return nil, err
	}
	res := &argonv1.IntroduceResponse{Self: id.self().proto()}
	for _, w := range m.about().Servers {
		res.Others = append(res.Others, w.proto())
	}
	return res, nil
}

// Meet leads this server to others of its cluster, at the addresses of their APIs,
// and them to it. It fails if one of them does not answer.
func (m *Member) Meet(ctx context.Context, addresses []string) ([]*argonv1.Whereabouts, error) {
	var met []*argonv1.Whereabouts
	for _, address := range addresses {
		res, err := m.introduce(ctx, withPort(address, DefaultAPIPort), "")
		if err != nil {
			return nil, err
		}
		met = append(met, res.GetSelf())
	}
	return met, nil
}

// introduce tells the server whose API is there where this one is, and takes up
// where it is. serverID is whom it must be; empty: any of this cluster.
func (m *Member) introduce(ctx context.Context, hostPort, serverID string) (*argonv1.IntroduceResponse, error) {
	id := m.about()
	if id.ServerID == "" {
		return nil, ErrUnconfigured
	}
	ctx, cancel := context.WithTimeout(ctx, introduceTimeout)
	defer cancel()
	var who Identity
	config := m.ClientTLS(serverID)
	verify := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) (err error) {
		if err := verify(state); err != nil {
			return err
		}
		who, err = identityOf(state.PeerCertificates[0])
		return err
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	c := argonv1connect.NewServerServiceClient(&http.Client{Transport: transport}, "https://"+hostPort)
	res, err := c.Introduce(ctx, connect.NewRequest(&argonv1.IntroduceRequest{Self: id.self().proto()}))
	if err != nil {
		return nil, introductionError(hostPort, err)
	}
	there := whereaboutsFrom(res.Msg.GetSelf())
	// Where it answers is where it is, whatever it calls that itself.
	if there.Address, _, err = net.SplitHostPort(hostPort); err != nil || there.ServerID != who.ID {
		return nil, fmt.Errorf("at %s answers server %s, and says that it is %s", hostPort, who.ID, there.ServerID)
	}
	return res.Msg, m.learn(there)
}

func introductionError(hostPort string, err error) error {
	var network *net.OpError
	if errors.As(err, &network) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no server of this cluster answers at %s: check the address, and that `argon server` runs there: %w", hostPort, err)
	}
	return fmt.Errorf("no server of this cluster answers at %s: %w", hostPort, err)
}

func (w whereabouts) api() string { return net.JoinHostPort(w.Address, strconv.Itoa(w.Ports.API)) }

// seek introduces this server to those that it remembers and to those that they
// hint at, until ctx ends.
func (m *Member) seek(ctx context.Context) {
	hints := map[string]whereabouts{}
	for ctx.Err() == nil {
		for _, w := range m.about().Servers {
			hints[w.ServerID+w.api()] = w
		}
		heard := make(chan whereabouts)
		var hearing sync.WaitGroup
		next := map[string]whereabouts{}
		hearing.Go(func() {
			for w := range heard {
				next[w.ServerID+w.api()] = w
			}
		})
		var calls errgroup.Group
		calls.SetLimit(introduceAtOnce)
		for _, w := range hints {
			calls.Go(func() error {
				if w.ServerID == m.ID() {
					return nil
				}
				res, err := m.introduce(ctx, w.api(), w.ServerID)
				if err != nil {
					m.opts.Log.Debug("a server was not met", "server", w.Name, "address", w.Address, "err", err)
				}
				for _, other := range res.GetOthers() {
					heard <- whereaboutsFrom(other)
				}
				return nil
			})
		}
		_ = calls.Wait()
		close(heard)
		hearing.Wait()
		hints = next
		_ = sleep(ctx, seekPause)
	}
}

// LeadIntroductions introduces this server to those that are lost, until ctx ends:
// they may not find the catalog because its voters have moved. The leader runs it.
func (m *Member) LeadIntroductions(ctx context.Context, view *catalog.View) error {
	for ctx.Err() == nil {
		st := view.State()
		var calls errgroup.Group
		calls.SetLimit(introduceAtOnce)
		for id, s := range serversOf(st) {
			if id == m.ID() || st.Leases[id] != nil {
				continue
			}
			calls.Go(func() error {
				if _, err := m.introduce(ctx, whereaboutsOf(s).api(), id); err != nil {
					m.opts.Log.Debug("a lost server was not met", "server", s.GetMeta().GetName(), "err", err)
				}
				return nil
			})
		}
		_ = calls.Wait()
		_ = sleep(ctx, introducePause)
	}
	return nil
}

func serversOf(st *catalog.State) map[string]*argonv1.Server {
	if st == nil {
		return nil
	}
	return st.Servers
}
