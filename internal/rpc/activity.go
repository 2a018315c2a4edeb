package rpc

import (
	"fmt"
	"time"

	"github.com/dustin/go-humanize"
	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/placement"
)

// activity says in words what is going on with a volume, one line for each
// thing: how far it is, and how long it still takes.
func activity(st *catalog.State, v *argonv1.Volume) []string {
	if v.GetRemoving() {
		return nil
	}
	status := st.VolumeStatus[v.GetMeta().GetId()]
	var lines []string
	say := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	for _, r := range v.GetReplicas() {
		if line := fetching(st, v, r); line != "" {
			lines = append(lines, line)
		}
	}
	for _, c := range status.GetResyncs() {
		what := ""
		if c.GetSnapshot() != "" {
			what = "snapshot " + c.GetSnapshot() + ", "
		}
		say("copying to %s: %s%s", replicaName(st, v, c.GetReplicaId()), what,
			progress(c.GetDoneBytes(), c.GetTotalBytes(), c.GetStarted(), status.GetUpdated()))
	}
	if to := v.GetRollbackTo(); to != 0 {
		say("rolling back to snapshot %s: %s", placement.Snapshot(v, to).GetName(),
			progress(status.GetRollbackDoneBytes(), status.GetRollbackTotalBytes(), nil, nil))
	}
	if wanted := v.GetWantedBytes(); wanted > v.GetSizeBytes() {
		say("growing to %s", humanize.IBytes(wanted))
	}
	if s := v.GetScrub(); s.GetWanted() > s.GetFinished() {
		switch name := status.GetScrubbedSnapshot(); {
		case name != "":
			say("scrub: snapshot %s, %s", name, progress(status.GetScrubbedBytes(), snapshotSize(v, name), nil, nil))
		case status.GetScrubbedBytes() > 0:
			say("scrub: %s", progress(status.GetScrubbedBytes(), v.GetSizeBytes(), nil, nil))
		default:
			say("scrub: about to begin")
		}
	}
	for _, s := range v.GetSnapshots() {
		if s.GetState() == beingTaken {
			say("snapshot %s: being taken", s.GetName())
		}
		if clones := placement.Clones(st, v.GetMeta().GetId(), s.GetId()); s.GetRemoving() && len(clones) > 0 {
			say("snapshot %s: removed once %s detached from it", s.GetName(), areBased(clones))
		}
	}
	return append(lines, detaching(st, v)...)
}

// fetching says how far the copy of the image is that a replica is to be made of;
// empty if it waits for none.
func fetching(st *catalog.State, v *argonv1.Volume, r *argonv1.Replica) string {
	i := st.Images[v.GetBase().GetImageId()]
	if i == nil || r.GetState() != creating {
		return ""
	}
	for _, c := range i.GetCopies() {
		if c.GetServerId() != r.GetServerId() || c.GetReady() {
			continue
		}
		what, done := "copied to", c.GetCopiedBytes()
		if c.GetCheckedBytes() > 0 {
			what, done = "checked on", c.GetCheckedBytes()
		}
		how := "about to begin"
		if done > 0 {
			how = progress(done, i.GetSizeBytes(), nil, nil)
		}
		return fmt.Sprintf("image %s is %s %s: %s", i.GetMeta().GetName(), what, serverName(st, r.GetServerId()), how)
	}
	return ""
}

// snapshotSize is the size of the volume's snapshot of that name.
func snapshotSize(v *argonv1.Volume, name string) uint64 {
	for _, s := range v.GetSnapshots() {
		if s.GetName() == name {
			return s.GetSizeBytes()
		}
	}
	return v.GetSizeBytes()
}

// detaching says which replicas still read from the base that the volume is
// to be detached from.
func detaching(st *catalog.State, v *argonv1.Volume) []string {
	if !v.GetBase().GetDetaching() {
		return nil
	}
	var lines []string
	for _, r := range v.GetReplicas() {
		if !r.GetBased() {
			continue
		}
		line := fmt.Sprintf("detaching: %s copies what it needs of %s", replicaName(st, v, r.GetId()), baseName(st, v.GetBase()))
		if !placement.Alive(st, r.GetServerId()) {
			line += ", once its server is back"
		} else if u := placement.ReplicaUsage(st, v, r); u != nil {
			line += ", " + progress(u.GetDetachedBytes(), v.GetSizeBytes(), nil, nil)
		}
		lines = append(lines, line)
	}
	return lines
}

func replicaName(st *catalog.State, v *argonv1.Volume, id uint32) string {
	for _, r := range v.GetReplicas() {
		if r.GetId() == id {
			return "server " + serverName(st, r.GetServerId())
		}
	}
	return fmt.Sprintf("replica %d", id)
}

// baseName is what users call a base; empty if there is none.
func baseName(st *catalog.State, b *argonv1.Base) string {
	switch {
	case b.GetImageId() != "":
		if i := st.Images[b.GetImageId()]; i != nil {
			return "image " + i.GetMeta().GetName()
		}
		return "image " + b.GetImageId()
	case b.GetVolumeId() != "":
		parent := st.Volumes[b.GetVolumeId()]
		if s := placement.Snapshot(parent, b.GetSnapshotId()); s != nil {
			return "snapshot " + parent.GetMeta().GetName() + "/" + s.GetName()
		}
		return "a snapshot that is gone"
	}
	return ""
}

// progress writes how far something is, and from two instants how long it will
// take if it goes on like that.
func progress(done, total uint64, started, now *timestamppb.Timestamp) string {
	if total == 0 {
		return "about to begin"
	}
	done = min(done, total)
	line := fmt.Sprintf("%s of %s (%d %%)", humanize.IBytes(done), humanize.IBytes(total), uint64(float64(done)/float64(total)*100))
	if started == nil || now == nil || done == 0 || done == total {
		return line
	}
	elapsed := now.AsTime().Sub(started.AsTime())
	if elapsed < time.Second {
		return line
	}
	left := time.Duration(float64(elapsed) * float64(total-done) / float64(done))
	return line + ", about " + roughly(left) + " left"
}

// roughly writes a duration by its two largest units.
func roughly(d time.Duration) string {
	s := int(d.Round(time.Second).Seconds())
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%ds", s/60, s%60)
	}
	return fmt.Sprintf("%dh%dm", s/3600, s/60%60)
}

func plural(n uint64, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}
