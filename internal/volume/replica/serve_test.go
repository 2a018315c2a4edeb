package replica_test

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// holder is the other end of a connection.
type holder struct {
	t  *testing.T
	nc net.Conn
}

func (h holder) ask(head wire.Header, payload []byte) (wire.Header, []byte) {
	h.t.Helper()
	head.Payload = uint32(len(payload))
	b := make([]byte, wire.HeaderSize)
	head.Put(b)
	if _, err := h.nc.Write(append(b, payload...)); err != nil {
		h.t.Fatal(err)
	}
	answer, err := wire.ReadHeader(h.nc, b)
	if err != nil {
		h.t.Fatal(err)
	}
	data := make([]byte, answer.Payload)
	if _, err := io.ReadFull(h.nc, data); err != nil {
		h.t.Fatal(err)
	}
	return answer, data
}

func (h holder) must(head wire.Header, payload []byte) []byte {
	h.t.Helper()
	answer, data := h.ask(head, payload)
	if answer.Status != wire.OK {
		h.t.Fatalf("request of type %d: status %d: %s", head.Type, answer.Status, data)
	}
	return data
}

// Everything that is about layers goes through a connection, too.
func TestServeSnapshots(t *testing.T) {
	d := newDisk(t)
	ours, theirs := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { _ = replica.Serve(t.Context(), theirs, d.store) })
	defer wg.Wait()
	defer ours.Close()
	h := holder{t, ours}
	h.must(wire.Header{Type: wire.Hello}, wire.Greeting{ClusterID: "c", VolumeID: "v", ReplicaID: 1, Epoch: 1}.Marshal())

	one := wire.MarshalID(1)
	h.must(wire.Header{Type: wire.Write, Len: 512, Generation: 1}, sector)
	h.must(wire.Header{Type: wire.Prepare}, nil)
	h.must(wire.Header{Type: wire.Snapshot, Generation: 2}, one)
	h.must(wire.Header{Type: wire.Zero, Len: 512, Generation: 2}, nil)
	if got := h.must(wire.Header{Type: wire.ReadSnapshot, Len: 512}, one); !bytes.Equal(got, sector) {
		t.Error("the snapshot is not what was written")
	}
	if got := h.must(wire.Header{Type: wire.ChangedSnapshot, Len: region, Generation: 0}, one); !bytes.Equal(got, []byte{1}) {
		t.Errorf("where the snapshot has data: %x", got)
	}
	if got := h.must(wire.Header{Type: wire.ChangedSnapshot, Len: region, Generation: 2}, one); !bytes.Equal(got, []byte{0}) {
		t.Errorf("what changed in the snapshot since: %x", got)
	}
	sums, err := wire.ParseSums(h.must(wire.Header{Type: wire.SnapshotSums, Len: region}, one))
	if err != nil || len(sums) != 1 || sums[0].State != wire.SumNew {
		t.Errorf("%+v, %v", sums, err)
	}
	d.rot("00000000", 7)
	verified := wire.Header{Type: wire.ReadSnapshotVerified, Len: region}
	if answer, text := h.ask(verified, one); answer.Status != wire.Damaged {
		t.Errorf("a verified read of a snapshot that is damaged: status %d: %s", answer.Status, text)
	}
	h.must(wire.Header{Type: wire.Mend, Len: region}, append(one[:wire.IDSize:wire.IDSize], append(bytes.Clone(sector), make([]byte, region-512)...)...))
	if got := h.must(verified, one); !bytes.Equal(got[:512], sector) {
		t.Error("what was mended is not what it was")
	}
	for _, typ := range []wire.Type{wire.ReadSnapshot, wire.ChangedSnapshot, wire.Revert, wire.SnapshotSums} {
		if answer, _ := h.ask(wire.Header{Type: typ, Len: 512}, wire.MarshalID(2)); answer.Status != wire.NoSnapshot {
			t.Errorf("request of type %d for a snapshot that is not there: status %d", typ, answer.Status)
		}
	}
	h.must(wire.Header{Type: wire.Revert, Len: region, Generation: 3}, one)
	if got := h.must(wire.Header{Type: wire.Read, Len: 512}, nil); !bytes.Equal(got, sector) {
		t.Error("put back, it is not what the snapshot is")
	}
	h.must(wire.Header{Type: wire.Resize, Len: 2 * region}, nil)
	sums, err = wire.ParseSums(h.must(wire.Header{Type: wire.Sums, Len: 2 * region, Generation: 9}, nil))
	if err != nil || len(sums) != 2 || sums[0].State != wire.SumNew || sums[0].Sum == sums[1].Sum {
		t.Errorf("%+v, %v", sums, err)
	}
	if got := h.must(wire.Header{Type: wire.ReadVerified, Len: region}, nil); !bytes.Equal(got[:512], sector) {
		t.Error("a verified read is not what is there")
	}
	f, err := d.fs.Open("/volumes/v/1/layer-00000001.data", false)
	d.must(err)
	_, err = f.WriteAt([]byte{1}, 0)
	d.must(err)
	if answer, text := h.ask(wire.Header{Type: wire.ReadVerified, Len: region}, nil); answer.Status != wire.Damaged {
		t.Errorf("a verified read of what is damaged: status %d: %s", answer.Status, text)
	}
	info, err := wire.ParseInfo(h.must(wire.Header{Type: wire.BeginSync, Generation: 10, Len: 3 * region}, nil))
	if err != nil || !info.Emptied {
		t.Errorf("%+v, %v", info, err)
	}
	h.must(wire.Header{Type: wire.Zero, Off: 2 * region, Len: region, Generation: 10}, nil)
	h.must(wire.Header{Type: wire.EndSync}, nil)
	h.must(wire.Header{Type: wire.Close}, nil)
}
