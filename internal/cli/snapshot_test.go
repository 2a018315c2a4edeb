package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// note remembers a call.
func (f *fakeAPI) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, fmt.Sprintf(format, args...))
}

func (f *fakeAPI) CreateSnapshot(_ context.Context, r *connect.Request[argonv1.CreateSnapshotRequest]) (*connect.Response[argonv1.CreateSnapshotResponse], error) {
	f.note("create %q %q %s %v", r.Msg.GetVolume(), r.Msg.GetMachine(), r.Msg.GetName(), r.Msg.GetLabels())
	return answer(&argonv1.CreateSnapshotResponse{Snapshots: []*argonv1.SnapshotView{snapshot1}})
}

func (f *fakeAPI) ListSnapshots(_ context.Context, r *connect.Request[argonv1.ListSnapshotsRequest]) (*connect.Response[argonv1.ListSnapshotsResponse], error) {
	f.note("list %q %q", r.Msg.GetVolume(), r.Msg.GetMachine())
	return answer(&argonv1.ListSnapshotsResponse{Snapshots: []*argonv1.SnapshotView{snapshot1}})
}

func (f *fakeAPI) GetSnapshot(context.Context, *connect.Request[argonv1.GetSnapshotRequest]) (*connect.Response[argonv1.GetSnapshotResponse], error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.busy--; f.busy < 0 {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("volume db has no snapshot monday"))
	}
	return answer(&argonv1.GetSnapshotResponse{Snapshot: snapshot1})
}

func (f *fakeAPI) RemoveSnapshot(_ context.Context, r *connect.Request[argonv1.RemoveSnapshotRequest]) (*connect.Response[argonv1.RemoveSnapshotResponse], error) {
	f.note("remove %q %q %s %v", r.Msg.GetVolume(), r.Msg.GetMachine(), r.Msg.GetName(), r.Msg.GetDetach())
	res := &argonv1.RemoveSnapshotResponse{}
	if r.Msg.GetDetach() {
		res.WaitsFor = []string{"test"}
	}
	return answer(res)
}

func (f *fakeAPI) RollBack(_ context.Context, r *connect.Request[argonv1.RollBackRequest]) (*connect.Response[argonv1.RollBackResponse], error) {
	f.note("rollback %q %q %s", r.Msg.GetVolume(), r.Msg.GetMachine(), r.Msg.GetName())
	return answer(&argonv1.RollBackResponse{Volumes: []*argonv1.VolumeView{volume1}})
}

func (f *fakeAPI) ResizeVolume(_ context.Context, r *connect.Request[argonv1.ResizeVolumeRequest]) (*connect.Response[argonv1.ResizeVolumeResponse], error) {
	f.note("resize %s %d", r.Msg.GetName(), r.Msg.GetSizeBytes())
	return answer(&argonv1.ResizeVolumeResponse{Volume: volume1})
}

func (f *fakeAPI) DetachBase(context.Context, *connect.Request[argonv1.DetachBaseRequest]) (*connect.Response[argonv1.DetachBaseResponse], error) {
	return answer(&argonv1.DetachBaseResponse{Volume: volume1})
}

func (f *fakeAPI) ScrubVolume(context.Context, *connect.Request[argonv1.ScrubVolumeRequest]) (*connect.Response[argonv1.ScrubVolumeResponse], error) {
	return answer(&argonv1.ScrubVolumeResponse{Volume: volume1, Number: 5})
}

func TestSnapshotCommands(t *testing.T) {
	for command, want := range map[string]struct {
		asked []string
		says  string
	}{
		"snapshot create db monday --label a=b":    {[]string{`create "db" "" monday map[a:b]`}, "ready"},
		"snapshot create --machine web monday":     {[]string{`create "" "web" monday map[]`}, "ready"},
		"machine snapshot web monday":              {[]string{`create "" "web" monday map[]`}, "ready"},
		"snapshot ls":                              {[]string{`list "" ""`}, "monday"},
		"snapshot ls db":                           {[]string{`list "db" ""`}, "monday"},
		"snapshot ls --machine web":                {[]string{`list "" "web"`}, "monday"},
		"snapshot rm db monday":                    {[]string{`remove "db" "" monday false`}, "snapshot db/monday removed"},
		"snapshot rm --machine web monday":         {[]string{`remove "" "web" monday false`}, "snapshot monday of machine web removed"},
		"snapshot rm db monday tuesday":            {[]string{`remove "db" "" monday false`, `remove "db" "" tuesday false`}, "snapshot db/tuesday removed"},
		"snapshot rm db/monday web/monday":         {[]string{`remove "db" "" monday false`, `remove "web" "" monday false`}, "snapshot web/monday removed"},
		"snapshot create db/monday":                {[]string{`create "db" "" monday map[]`}, "ready"},
		"snapshot rollback db/monday":              {[]string{`rollback "db" "" monday`}, "volume db is as in snapshot monday again"},
		"snapshot rm db monday --detach":           {[]string{`remove "db" "" monday true`}, "snapshot db/monday removed"},
		"snapshot rm db monday --detach --no-wait": {[]string{`remove "db" "" monday true`}, "removed once volume test is detached"},
		"snapshot rollback db monday":              {[]string{`rollback "db" "" monday`}, "volume db is as in snapshot monday again"},
		"snapshot rollback db monday --no-wait":    {[]string{`rollback "db" "" monday`}, "is being rolled back"},
		"volume resize db 40GiB":                   {[]string{"resize db 42949672960"}, "10GiB"},
		"volume detach-base db":                    {nil, "db"},
		"volume scrub db":                          {nil, "volume show db"},
		"volume scrub db --wait":                   {nil, "10 regions compared, 1 repaired"},
	} {
		f := &fakeAPI{busy: 2}
		r := runArgon(serveFake(t, f), "", strings.Fields(command)...)
		if r.code != 0 || !strings.Contains(r.out, want.says) || r.err != "" {
			t.Errorf("%s: %+v, want %q", command, r, want.says)
		}
		if !slices.Equal(f.asked, want.asked) {
			t.Errorf("%s: asked for %q, want %q", command, f.asked, want.asked)
		}
	}
}

func TestSplitSnapshot(t *testing.T) {
	for path, want := range map[string]bool{"db/monday": true, "db": false, "/monday": false, "db/": false, "a/b/c": false, "": false} {
		if _, _, ok := splitSnapshot(path); ok != want {
			t.Errorf("%q: %v", path, ok)
		}
	}
}
