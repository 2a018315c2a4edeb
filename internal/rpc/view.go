package rpc

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/dustin/go-humanize"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// This file turns records into what the API shows: pure functions.

const (
	creating  = argonv1.ReplicaState_REPLICA_STATE_CREATING
	inSync    = argonv1.ReplicaState_REPLICA_STATE_IN_SYNC
	outOfSync = argonv1.ReplicaState_REPLICA_STATE_OUT_OF_SYNC
	removing  = argonv1.ReplicaState_REPLICA_STATE_REMOVING
)

// sorted lists records by name.
func sorted[R interface{ GetMeta() *argonv1.Meta }](records map[string]R) []R {
	return slices.SortedFunc(maps.Values(records), func(a, b R) int {
		return cmp.Compare(a.GetMeta().GetName(), b.GetMeta().GetName())
	})
}

func serverName(st *catalog.State, id string) string {
	return cmp.Or(st.Servers[id].GetMeta().GetName(), id)
}

func serverView(st *catalog.State, s *argonv1.Server) *argonv1.ServerView {
	id := s.GetMeta().GetId()
	v := &argonv1.ServerView{Server: s, Alive: placement.Alive(st, id), Allocated: placement.Allocated(st, id), Usage: st.Usage[id]}
	for _, m := range st.Machines {
		if m.GetServerId() == id {
			v.Machines++
		}
	}
	for _, vol := range st.Volumes {
		for _, r := range vol.GetReplicas() {
			if r.GetServerId() == id {
				v.Replicas++
			}
		}
	}
	v.Draining = draining(st, s)
	v.RemovalCosts = removalCosts(st, s)
	return v
}

func machineView(st *catalog.State, m *argonv1.Machine) *argonv1.MachineView {
	v := &argonv1.MachineView{Machine: withoutSecrets(m)}
	if m.GetServerId() != "" {
		v.ServerName = serverName(st, m.GetServerId())
	}
	v.NextStart = nextStart(m, m)
	v.ClosedPorts = closedPorts(st, m)
	v.Changing = changing(st, m)
	for _, id := range m.GetVolumeIds() {
		v.VolumeNames = append(v.VolumeNames, cmp.Or(st.Volumes[id].GetMeta().GetName(), id))
		if disk := st.Volumes[id]; disk != nil {
			v.Activity = append(v.Activity, activity(st, disk)...)
		}
	}
	return v
}

// changing says what of a machine's disks and network cards its guest is being given,
// or is to let go of.
func changing(st *catalog.State, m *argonv1.Machine) []string {
	if m.GetServerId() == "" {
		return nil
	}
	c := placement.Changing(m)
	name := func(id string) string { return cmp.Or(st.Volumes[id].GetMeta().GetName(), id) }
	var lines []string
	for _, id := range c.Attach {
		lines = append(lines, fmt.Sprintf("the guest is being given disk %s", name(id)))
	}
	for _, id := range c.Detach {
		lines = append(lines, fmt.Sprintf("disk %s stays until the guest lets go of it or stops", name(id)))
	}
	for _, mac := range c.AddCards {
		lines = append(lines, fmt.Sprintf("the guest is being given network card %s", mac))
	}
	for _, mac := range c.RemoveCards {
		lines = append(lines, fmt.Sprintf("network card %s stays until the guest lets go of it or stops", mac))
	}
	return lines
}

func volumeView(st *catalog.State, v *argonv1.Volume) *argonv1.VolumeView {
	health, advice := volumeHealth(st, v)
	view := &argonv1.VolumeView{
		Volume: v, Status: st.VolumeStatus[v.GetMeta().GetId()], Health: health, Advice: advice,
		Activity: activity(st, v), Base: baseName(st, v.GetBase()), Clones: namesOf(placement.Clones(st, v.GetMeta().GetId(), 0)),
	}
	for _, r := range v.GetReplicas() {
		if u := placement.ReplicaUsage(st, v, r); u != nil {
			view.Usage = append(view.Usage, u)
		}
	}
	return view
}

// volumeHealth says how a volume is and what to do about it.
func volumeHealth(st *catalog.State, v *argonv1.Volume) (health, advice string) {
	var alive, set int
	var away, bad, gone, behind, making []string
	for _, r := range v.GetReplicas() {
		server := serverName(st, r.GetServerId())
		up := placement.Alive(st, r.GetServerId())
		switch r.GetState() {
		case inSync:
			set++
			switch {
			case !up:
				away = append(away, server)
			case placement.BadDisk(st.Servers[r.GetServerId()]) != "":
				bad = append(bad, server)
			default:
				alive++
			}
		case creating:
			making = append(making, server)
		case outOfSync:
			if up {
				behind = append(behind, server)
			} else {
				gone = append(gone, server)
			}
		}
	}
	name, wanted := v.GetMeta().GetName(), int(v.GetReplicasWanted())
	switch {
	case v.GetRemoving():
		return "removing", removalAdvice(st, v)
	case set == 0 && v.GetEpoch() == 0:
		return "creating", creatingAdvice(st, v, making)
	case set == 0:
		return "unavailable", fmt.Sprintf("no replica is in sync: if none can come back, `argon volume promote %s SERVER` trusts a stale one", name)
	case alive == 0 && len(bad) > 0:
		return "degraded", fmt.Sprintf("in sync only on %s, whose disk failed: mend it", strings.Join(slices.Concat(bad, away), ", "))
	case alive == 0:
		return "unavailable", fmt.Sprintf("in sync only on %s: start that server", strings.Join(away, ", "))
	case alive >= wanted:
		return "healthy", scrubAdvice(v)
	case len(bad) > 0 && len(behind)+len(making) == 0:
		return "degraded", fmt.Sprintf("mend the disk of %s, or add a server for a new replica", strings.Join(bad, ", "))
	case len(away) > 0:
		return "degraded", fmt.Sprintf("start server %s, or wait for a new replica elsewhere", strings.Join(away, ", "))
	case len(behind)+len(making) > 0:
		return "degraded", fmt.Sprintf("being copied to %s: wait", strings.Join(slices.Concat(behind, making), ", "))
	case len(gone) > 0:
		return "degraded", fmt.Sprintf("start server %s, or wait for a new replica elsewhere", strings.Join(gone, ", "))
	}
	return "degraded", fmt.Sprintf("%d of %d replicas: add servers with free disk", set, wanted)
}

func creatingAdvice(st *catalog.State, v *argonv1.Volume, making []string) string {
	if id := v.GetBase().GetImageId(); id != "" && st.Images[id] == nil {
		return fmt.Sprintf("its image is gone: remove it with `argon volume rm %s`", v.GetMeta().GetName())
	}
	if len(making) == 0 {
		return "no server has room for it: add servers with free disk"
	}
	return "being made on " + strings.Join(making, ", ")
}

// scrubAdvice: a difference that nobody can resolve is the operator's.
func scrubAdvice(v *argonv1.Volume) string {
	if n := v.GetScrub().GetUnclear(); n > 0 {
		return fmt.Sprintf("the last scrub found %s that differ between replicas, and nothing tells which is right: see `argon events --kind volume` for where, then check what is there, roll the volume back, or delete the snapshot",
			plural(n, "region"))
	}
	return ""
}

func removalAdvice(st *catalog.State, v *argonv1.Volume) string {
	var wait []string
	for _, r := range v.GetReplicas() {
		if !placement.Alive(st, r.GetServerId()) {
			wait = append(wait, serverName(st, r.GetServerId()))
		}
	}
	if len(wait) == 0 {
		return ""
	}
	return fmt.Sprintf("gone once %s is back, or is removed with `argon server rm`", strings.Join(wait, ", "))
}

// catalogWarnings say that the catalog is about to be full, or is.
func catalogWarnings(c *argonv1.CatalogLoad) []string {
	used, quota := c.GetUsedBytes(), c.GetQuotaBytes()
	is := fmt.Sprintf("the catalog has %s of %s", humanize.IBytes(used), humanize.IBytes(quota))
	switch {
	case c.GetFull():
		return []string{is + " and takes nothing new: remove machines, volumes, snapshots, checkpoints or user data that nobody needs"}
	case used >= quota/2 && quota > 0:
		return []string{is + ", and takes nothing new from nine tenths on: remove what nobody needs"}
	}
	return nil
}

// warnings say what stands in the way of surviving the loss of any one server.
func warnings(st *catalog.State) []string {
	var w []string
	var voters, down, lacks []string
	hosts := 0
	for _, s := range sorted(st.Servers) {
		name := s.GetMeta().GetName()
		if s.GetVoterRole() == argonv1.VoterRole_VOTER_ROLE_VOTER {
			voters = append(voters, name)
		}
		if !s.GetWitness() {
			hosts++
		}
		if !placement.Alive(st, s.GetMeta().GetId()) {
			down = append(down, name)
		}
		lacks = append(lacks, serverLacks(s)...)
	}
	for _, s := range sorted(st.Servers) {
		for _, d := range s.GetDisks() {
			if d.GetProblem() != "" {
				w = append(w, fmt.Sprintf("the disk at %s on server %s is not used: %s", d.GetPath(), s.GetMeta().GetName(), d.GetProblem()))
			}
		}
		if why := s.GetDirectoryProblem(); why != "" {
			w = append(w, fmt.Sprintf("on server %s %s: its records live on what was kept for them: free some space there", s.GetMeta().GetName(), why))
		}
	}
	if len(down) > 0 {
		w = append(w, fmt.Sprintf("server %s is down: start it, or `argon server rm --force` it if it is lost for good", strings.Join(down, ", ")))
	}
	switch {
	case len(st.Servers) < 3 && len(voters) > 0:
		w = append(w, fmt.Sprintf("the loss of server %s stops the cluster until it returns: add a third server or witness", strings.Join(voters, " or ")))
	case len(voters) < 3:
		w = append(w, fmt.Sprintf("only %d of %d servers vote yet: until three do, the loss of %s stops the cluster", len(voters), len(st.Servers), strings.Join(voters, " or ")))
	}
	if hosts == 1 {
		w = append(w, "only one server can run machines: they have nowhere to go when it is lost")
	}
	for _, v := range sorted(st.Volumes) {
		name := v.GetMeta().GetName()
		if health, advice := volumeHealth(st, v); health == "degraded" || health == "unavailable" {
			w = append(w, fmt.Sprintf("volume %s is %s: %s", name, health, advice))
		} else if v.GetReplicasWanted() == 1 && !v.GetRemoving() {
			w = append(w, fmt.Sprintf("volume %s has one replica: it is lost with server %s", name, serverName(st, onlyServer(v))))
		}
	}
	for _, m := range sorted(st.Machines) {
		for _, c := range closedPorts(st, m) {
			w = append(w, fmt.Sprintf("machine %s can't be reached at %s", m.GetMeta().GetName(), c))
		}
	}
	return append(w, lacks...)
}

// serverLacks is what machines would miss on a server.
func serverLacks(s *argonv1.Server) []string {
	var w []string
	name := s.GetMeta().GetName()
	if why := s.GetAccelerationDetail(); why != "" {
		w = append(w, fmt.Sprintf("server %s has no KVM: its machines are emulated, slowly: %s", name, why))
	}
	if why := s.GetClosedNetwork(); why != "" && !s.GetWitness() {
		w = append(w, fmt.Sprintf("machines on server %s open no connections: loopback can't be closed to them: %s", name, why))
	}
	return w
}

// closedPorts are a machine's published ports that servers which live can't open.
func closedPorts(st *catalog.State, m *argonv1.Machine) []string {
	var w []string
	for _, s := range sorted(st.Servers) {
		for _, c := range s.GetClosedPorts() {
			published := slices.ContainsFunc(m.GetPorts(), func(p *argonv1.PublishedPort) bool { return p.GetClusterPort() == c.GetPort() })
			if published && c.GetMachineId() == m.GetMeta().GetId() && placement.Alive(st, s.GetMeta().GetId()) {
				w = append(w, fmt.Sprintf("port %d on server %s: %s", c.GetPort(), s.GetMeta().GetName(), c.GetReason()))
			}
		}
	}
	return w
}

func onlyServer(v *argonv1.Volume) string {
	for _, r := range v.GetReplicas() {
		if r.GetState() == inSync {
			return r.GetServerId()
		}
	}
	return ""
}

// countMachines counts those that run.
func countMachines(st *catalog.State) (running uint32) {
	for _, m := range st.Machines {
		s := m.GetStatus().GetState()
		up := s == argonv1.MachineState_MACHINE_STATE_RUNNING || s == argonv1.MachineState_MACHINE_STATE_PAUSED || s == argonv1.MachineState_MACHINE_STATE_STOPPING
		if up && placement.Alive(st, m.GetStatus().GetServerId()) {
			running++
		}
	}
	return running
}
