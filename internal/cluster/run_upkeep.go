package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

const (
	// upkeepTick is how often the catalog's size is looked at in the own etcd,
	// which costs nothing; lookEvery after how many such looks all members are
	// asked.
	upkeepTick = 500 * time.Millisecond
	lookEvery  = 120
	// historyLeast is the least time between two compactions that are made
	// although little was written, because the catalog is full.
	historyLeast = 2 * time.Second
	// sweepEvery is how often contents are looked for that nobody refers to.
	sweepEvery = time.Hour
	// defragTimeout bounds one defragmentation.
	defragTimeout = 5 * time.Minute
)

// RunUpkeep keeps room in the catalog until ctx ends. Every server runs it; the
// one whose etcd leads does the work. That is not the leader of the cluster:
// where etcd takes no writes none can be elected, and where there is a majority
// of the voters, one of them leads.
func (m *Member) RunUpkeep(ctx context.Context, view *catalog.View) error {
	p, err := m.running()
	if err != nil {
		return err
	}
	trouble := complaint{log: m.opts.Log, about: "the catalog can't be kept small; trying again"}
	var u *upkeeper
	for ctx.Err() == nil {
		e := m.leadingEtcd()
		switch {
		case e == nil:
			u = nil
		case u == nil || u.etcd != e:
			u = &upkeeper{member: m, parts: p, etcd: e, view: view}
		}
		if err := m.reserveFile(); err != nil {
			m.opts.Log.Debug("room for the catalog's file is not kept", "err", err)
		}
		if u != nil {
			again, err := u.pass(ctx)
			if !trouble.tell(ctx, err) && again {
				continue
			}
		}
		_ = sleep(ctx, upkeepTick)
	}
	return nil
}

// leadingEtcd is this server's etcd while it leads the others; nil otherwise.
func (m *Member) leadingEtcd() *etcdServer {
	m.etcdMu.Lock()
	defer m.etcdMu.Unlock()
	if m.etcd == nil || uint64(m.etcd.etcd.Server.Leader()) != m.etcd.id() {
		return nil
	}
	return m.etcd
}

// upkeeper is what a server remembers while its etcd leads.
type upkeeper struct {
	member *Member
	parts  *parts
	etcd   *etcdServer
	view   *catalog.View

	looks int
	// before is etcd's revision at the look before this one: what is older is
	// history that nobody needs but who is behind.
	before, now int64
	// compacted is up to where history was removed, compactedAt when, on the
	// boottime clock; floor is how much was used after that.
	compacted   int64
	compactedAt time.Duration
	floor       int64
	swept       time.Duration // when; 0: never
}

// pass takes one step. again: there may be another one.
func (u *upkeeper) pass(ctx context.Context) (again bool, err error) {
	st := u.view.State()
	if st == nil {
		return false, nil
	}
	l, err := u.look(ctx, st)
	if err != nil {
		return false, err
	}
	if step := planUpkeep(l); step.kind != noUpkeep {
		u.member.opts.Log.Info("the catalog's upkeep", "step", step.String(), "used", l.used(), "quota", l.quota)
		if err := u.carryOut(ctx, step); err != nil {
			return false, fmt.Errorf("%v: %w", step, err)
		}
		return step.kind != handOver && step.kind != defragment, nil
	}
	return false, u.sweep(ctx, st)
}

// look finds out how much there is.
func (u *upkeeper) look(ctx context.Context, st *catalog.State) (load, error) {
	server, now := u.etcd.etcd.Server, u.member.opts.Boottime()
	l := load{quota: u.member.opts.CatalogQuota, full: st.Full}
	for _, a := range server.Alarms() {
		l.alarm = l.alarm || a.GetAlarm() == etcdserverpb.AlarmType_NOSPACE
	}
	u.before, u.now = u.now, server.KV().Rev()
	own := memberLoad{id: u.etcd.id(), size: server.Backend().Size(), used: server.Backend().SizeInUse(), leads: true}
	if u.floor = min(u.floor, own.used); u.floor == 0 && u.compacted > 0 {
		u.floor = own.used
	}
	l.floor, l.members = u.floor, []memberLoad{own}
	l.history = u.before > u.compacted
	l.noRoom = u.member.opts.NoRoom() && aloneVotes(st)
	l.rested = u.compacted == 0 || now-u.compactedAt >= historyLeast
	if u.looks++; u.looks%lookEvery == 0 || l.alarm {
		others, err := u.others(ctx, own.id)
		if err != nil {
			return load{}, err
		}
		l.members, l.complete = append(l.members, others...), true
	}
	return l, nil
}

// aloneVotes reports whether there is one voter. Where there are others they go on
// without one whose disk is full.
func aloneVotes(st *catalog.State) bool {
	n := 0
	for _, s := range st.Servers {
		if s.GetVoterRole() == argonv1.VoterRole_VOTER_ROLE_VOTER {
			n++
		}
	}
	return n == 1
}

// others asks the other members of etcd.
func (u *upkeeper) others(ctx context.Context, own uint64) ([]memberLoad, error) {
	ctx, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	list, err := u.parts.client.MemberList(ctx)
	if err != nil {
		return nil, fmt.Errorf("list etcd's members: %w", err)
	}
	var all []memberLoad
	for _, m := range list.Members {
		if m.ID == own {
			continue
		}
		if len(m.ClientURLs) == 0 {
			return nil, fmt.Errorf("member %x of etcd has not started yet", m.ID)
		}
		res, err := u.parts.client.Status(ctx, m.ClientURLs[0])
		if err != nil {
			return nil, fmt.Errorf("ask member %x of etcd how large it is: %w", m.ID, err)
		}
		all = append(all, memberLoad{id: m.ID, size: res.DbSize, used: res.DbSizeInUse, learner: m.IsLearner})
	}
	return all, nil
}

func (u *upkeeper) carryOut(ctx context.Context, step upkeepStep) error {
	bounded, cancel := context.WithTimeout(ctx, memberTimeout)
	defer cancel()
	switch step.kind {
	case compact:
		return u.compact(ctx)
	case markFull:
		return u.mark(bounded, true, argonv1.Severity_SEVERITY_ERROR, "catalog-full", "the catalog takes nothing new until there is room: "+step.why)
	case markRoom:
		return u.mark(bounded, false, argonv1.Severity_SEVERITY_INFO, "catalog-has-room", "the catalog takes everything again")
	case defragment:
		return u.defragment(ctx, step.member)
	case handOver:
		return u.etcd.etcd.Server.MoveLeader(bounded, u.etcd.id(), step.member)
	case disarm:
		for _, a := range u.etcd.etcd.Server.Alarms() {
			if a.GetAlarm() != etcdserverpb.AlarmType_NOSPACE {
				continue
			}
			if _, err := u.parts.client.AlarmDisarm(bounded, &clientv3.AlarmMember{MemberID: a.GetMemberID(), Alarm: a.GetAlarm()}); err != nil {
				return err
			}
		}
	}
	return nil
}

// compact removes the history before the last look.
func (u *upkeeper) compact(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, defragTimeout)
	defer cancel()
	if _, err := u.parts.client.Compact(ctx, u.before, clientv3.WithCompactPhysical()); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		return err
	}
	u.compacted, u.compactedAt, u.floor = u.before, u.member.opts.Boottime(), 0
	return nil
}

// mark says whether the catalog is full, and that it changed.
func (u *upkeeper) mark(ctx context.Context, full bool, severity argonv1.Severity, reason, message string) error {
	if err := u.parts.store.SetFull(ctx, full); err != nil {
		return err
	}
	if err := u.view.Sync(ctx); err != nil {
		return err
	}
	return u.parts.store.Events.Append(ctx, &argonv1.Event{
		Severity: severity, Kind: "catalog", ServerId: u.parts.id.ServerID, Reason: reason, Message: message,
	})
}

func (u *upkeeper) defragment(ctx context.Context, member uint64) error {
	ctx, cancel := context.WithTimeout(ctx, defragTimeout)
	defer cancel()
	list, err := u.parts.client.MemberList(ctx)
	if err != nil {
		return fmt.Errorf("list etcd's members: %w", err)
	}
	for _, m := range list.Members {
		if m.ID != member || len(m.ClientURLs) == 0 {
			continue
		}
		begun := u.member.opts.Boottime()
		if _, err := u.parts.client.Defragment(ctx, m.ClientURLs[0]); err != nil {
			return err
		}
		u.member.opts.Log.Info("a voter's file was defragmented", "member", fmt.Sprintf("%x", member), "took", u.member.opts.Boottime()-begun)
	}
	return nil
}

// sweep deletes now and then what is left of records.
func (u *upkeeper) sweep(ctx context.Context, st *catalog.State) error {
	now := u.member.opts.Boottime()
	if u.swept != 0 && now-u.swept < sweepEvery {
		return nil
	}
	u.swept = now
	return u.parts.store.SweepContent(ctx, st)
}

// CatalogLoad is how large the catalog is, and may become.
func (m *Member) CatalogLoad(ctx context.Context) (*argonv1.CatalogLoad, error) {
	p, err := m.running()
	if err != nil {
		return nil, err
	}
	res, err := etcdserverpb.NewMaintenanceClient(p.client.ActiveConnection()).Status(ctx, &etcdserverpb.StatusRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask a voter how large the catalog is: %w", err)
	}
	return &argonv1.CatalogLoad{UsedBytes: uint64(res.GetDbSizeInUse()), QuotaBytes: uint64(m.opts.CatalogQuota), FileBytes: uint64(res.GetDbSize())}, nil
}
