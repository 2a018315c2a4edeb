package rpc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

const (
	defaultTokenTTL  = time.Hour
	maxTokenTTL      = 30 * 24 * time.Hour
	maxTokenServers  = 1000
	defaultClientTTL = 365 * 24 * time.Hour
	maxClientTTL     = 10 * 365 * 24 * time.Hour
	// statusTimeout is how long Status waits for a majority before it says
	// that there is none.
	statusTimeout = 2 * time.Second
)

type clusterService struct{ *API }

func (s clusterService) Init(ctx context.Context, req *connect.Request[argonv1.InitRequest]) (*connect.Response[argonv1.InitResponse], error) {
	m := req.Msg
	if err := checkName("cluster", m.GetClusterName()); err != nil {
		return nil, err
	}
	if err := checkNewServer(m.GetServerName(), m.GetZone()); err != nil {
		return nil, err
	}
	if err := checkSettings(m.GetSettings()); err != nil {
		return nil, err
	}
	res, err := s.local.Init(ctx, m)
	return answer(res, err)
}

func (s clusterService) Join(ctx context.Context, req *connect.Request[argonv1.JoinRequest]) (*connect.Response[argonv1.JoinResponse], error) {
	m := req.Msg
	if err := checkNewServer(m.GetServerName(), m.GetZone()); err != nil {
		return nil, err
	}
	if m.GetAddress() == "" || m.GetToken() == "" {
		return nil, invalid("joining needs the address of any server of the cluster, and a token from `argon token create` there")
	}
	res, err := s.local.Join(ctx, m)
	return answer(res, err)
}

func checkNewServer(name, zone string) error {
	if err := checkName("server", name); err != nil {
		return err
	}
	return checkZone(zone)
}

// maxCPUOvercommit leaves guests at least a hundredth of a CPU.
const maxCPUOvercommit = 100

func checkSettings(set *argonv1.Settings) error {
	for _, s := range []struct {
		what     string
		n        uint32
		min, max uint32
	}{
		{"lease", set.GetLeaseSeconds(), 2, 60},
		{"replica grace", set.GetReplicaGraceSeconds(), 1, 30 * 24 * 3600},
		{"voter grace", set.GetVoterGraceSeconds(), 1, 30 * 24 * 3600},
	} {
		if s.n != 0 && (s.n < s.min || s.n > s.max) {
			return invalid("the %s time: %d s: give %d to %d s", s.what, s.n, s.min, s.max)
		}
	}
	if n := set.GetCpuOvercommit(); n > maxCPUOvercommit {
		return invalid("%d virtual CPUs for each CPU: give 1 to %d", n, maxCPUOvercommit)
	}
	return nil
}

func (s clusterService) Admit(ctx context.Context, req *connect.Request[argonv1.AdmitRequest]) (*connect.Response[argonv1.AdmitResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	if err := checkNewServer(req.Msg.GetServer().GetMeta().GetName(), req.Msg.GetServer().GetZone()); err != nil {
		return nil, err
	}
	res, err := p.Members.Admit(ctx, req.Msg)
	return answer(res, err)
}

func (s clusterService) Status(ctx context.Context, _ *connect.Request[argonv1.StatusRequest]) (*connect.Response[argonv1.StatusResponse], error) {
	res := &argonv1.StatusResponse{Version: s.local.Version()}
	res.State, res.Detail = s.local.Condition()
	p := s.local.Parts()
	if p == nil {
		return connect.NewResponse(res), nil
	}
	bounded, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	if _, err := p.fresh(bounded); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		res.State = "no-majority"
		res.Detail = "no majority of the voters answers; what is shown was true when one last did"
	} else {
		res.LeaderId = p.Members.LeaderID(bounded)
		// Without it, if the voter that was asked does not answer in time.
		res.Catalog, _ = p.Members.CatalogLoad(bounded)
	}
	fillStatus(res, p.View.State(), p.ServerID, p.Now())
	return connect.NewResponse(res), nil
}

func fillStatus(res *argonv1.StatusResponse, st *catalog.State, serverID string, now time.Time) {
	res.Cluster, res.Server = st.Cluster, st.Servers[serverID]
	for _, s := range sorted(st.Servers) {
		res.Servers = append(res.Servers, serverView(st, s))
	}
	res.MachinesTotal = uint32(len(st.Machines))
	res.MachinesRunning = countMachines(st)
	res.VolumesTotal = uint32(len(st.Volumes))
	for _, v := range st.Volumes {
		if health, _ := volumeHealth(st, v); health == "degraded" || health == "unavailable" {
			res.VolumesDegraded++
		}
	}
	if res.Catalog != nil {
		res.Catalog.Full = st.Full
	}
	res.Warnings = slices.Concat(catalogWarnings(res.Catalog), warnings(st), certificateWarnings(st, now))
}

// SetCluster changes what is given.
func (s clusterService) SetCluster(ctx context.Context, req *connect.Request[argonv1.SetClusterRequest]) (*connect.Response[argonv1.SetClusterResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	m := req.Msg
	wanted := &argonv1.Settings{
		ReplicaGraceSeconds: m.GetReplicaGraceSeconds(), VoterGraceSeconds: m.GetVoterGraceSeconds(), CpuOvercommit: m.GetCpuOvercommit(),
	}
	if err := checkSettings(wanted); err != nil {
		return nil, err
	}
	if m.ReplicaGraceSeconds != nil && m.GetReplicaGraceSeconds() == 0 || m.VoterGraceSeconds != nil && m.GetVoterGraceSeconds() == 0 {
		return nil, invalid("a grace time of 0: give 1 s at least")
	}
	if m.CpuOvercommit != nil && m.GetCpuOvercommit() == 0 {
		return nil, invalid("0 virtual CPUs for each CPU: give 1 to %d", maxCPUOvercommit)
	}
	bounded, cancel := context.WithTimeout(ctx, catalogTimeout)
	defer cancel()
	c, err := p.Store.ChangeCluster(bounded, func(c *argonv1.Cluster) { alterSettings(c, m) })
	if err != nil {
		return nil, noMajority(ctx, err)
	}
	return answer(&argonv1.SetClusterResponse{Cluster: c}, nil)
}

func alterSettings(c *argonv1.Cluster, m *argonv1.SetClusterRequest) {
	if c.Settings == nil {
		c.Settings = &argonv1.Settings{}
	}
	if m.ScrubIntervalHours != nil {
		c.Settings.ScrubIntervalHours, c.Settings.ScrubOff = m.GetScrubIntervalHours(), m.GetScrubIntervalHours() == 0
	}
	if m.ReplicaGraceSeconds != nil {
		c.Settings.ReplicaGraceSeconds = m.GetReplicaGraceSeconds()
	}
	if m.VoterGraceSeconds != nil {
		c.Settings.VoterGraceSeconds = m.GetVoterGraceSeconds()
	}
	if m.CpuOvercommit != nil {
		c.Settings.CpuOvercommit = m.GetCpuOvercommit()
	}
}

func (s clusterService) CreateToken(ctx context.Context, req *connect.Request[argonv1.CreateTokenRequest]) (*connect.Response[argonv1.CreateTokenResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	ttl := time.Duration(req.Msg.GetTtlSeconds()) * time.Second
	if ttl == 0 {
		ttl = defaultTokenTTL
	}
	if ttl > maxTokenTTL {
		return nil, invalid("a token for %v: at most %v", ttl, maxTokenTTL)
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	servers := max(req.Msg.GetServers(), 1)
	if servers > maxTokenServers {
		return nil, invalid("a token for %d servers: at most %d", servers, maxTokenServers)
	}
	token, record, err := p.Members.CreateToken(ctx, servers, ttl)
	if err != nil {
		return nil, err
	}
	address := apiAddress(st.Servers[p.ServerID])
	return answer(&argonv1.CreateTokenResponse{
		Token: token, Record: record, Address: address, InstallCommand: installCommand(address, p.Members.KeyPin(), token),
	}, nil)
}

func (s clusterService) ListTokens(ctx context.Context, _ *connect.Request[argonv1.ListTokensRequest]) (*connect.Response[argonv1.ListTokensResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	if _, err := p.fresh(ctx); err != nil {
		return nil, err
	}
	tokens, err := p.Members.ListTokens(ctx)
	return answer(&argonv1.ListTokensResponse{Tokens: tokens}, err)
}

func (s clusterService) DeleteToken(ctx context.Context, req *connect.Request[argonv1.DeleteTokenRequest]) (*connect.Response[argonv1.DeleteTokenResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	if _, err := p.fresh(ctx); err != nil {
		return nil, err
	}
	err = p.Members.DeleteToken(ctx, req.Msg.GetId())
	if errors.Is(err, catalog.ErrNotFound) {
		err = notFound("token", req.Msg.GetId())
	}
	return answer(&argonv1.DeleteTokenResponse{}, err)
}

func (s clusterService) IssueClientCertificate(ctx context.Context, req *connect.Request[argonv1.IssueClientCertificateRequest]) (*connect.Response[argonv1.IssueClientCertificateResponse], error) {
	p, err := s.parts()
	if err != nil {
		return nil, err
	}
	if err := checkName("client", req.Msg.GetName()); err != nil {
		return nil, err
	}
	ttl := time.Duration(req.Msg.GetTtlSeconds()) * time.Second
	if ttl == 0 {
		ttl = defaultClientTTL
	}
	if ttl > maxClientTTL {
		return nil, invalid("a client certificate for %v: at most %v", ttl, maxClientTTL)
	}
	st, err := p.fresh(ctx)
	if err != nil {
		return nil, err
	}
	by := callerName(st, p.ServerID, callerOf(ctx))
	pem, err := p.Members.IssueClient(ctx, req.Msg.GetName(), req.Msg.GetCertificateRequest(), ttl, by)
	if err != nil {
		return nil, fmt.Errorf("certificate for client %s: %w", req.Msg.GetName(), err)
	}
	p.tell(ctx, argonv1.Severity_SEVERITY_INFO, "cluster", "", req.Msg.GetName(), "client-created", "a client certificate was made by "+by)
	return answer(&argonv1.IssueClientCertificateResponse{
		CertificatePem: pem, CaCertificatePem: st.Cluster.GetCaCertificatePem(), Servers: apiAddresses(st),
	}, nil)
}

// answer wraps what a handler returns.
func answer[R any](res *R, err error) (*connect.Response[R], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}
