package replica_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/argon-cluster/argon/internal/volume/layer"
	"github.com/argon-cluster/argon/internal/volume/replica"
	"github.com/argon-cluster/argon/internal/volume/wire"
)

// fuzzSize is the size of the replica that the frames are sent to, fuzzLimit
// what it may grow to.
const (
	fuzzSize  = 4 << 20
	fuzzLimit = 64 << 20
)

// script turns bytes into frames of a session, eight bytes for each: type and
// flags, offset, length, generation, snapshot, and what is wrong with it.
func script(b []byte) (out []byte, frames int) {
	for id := uint64(1); len(b) >= 8; id, b = id+1, b[8:] {
		h := wire.Header{
			Type: wire.Type(b[0] % 32), FUA: b[1]&1 != 0, ID: id,
			Off: int64(b[2]) << (b[1] >> 1 & 15), Len: int64(b[3]) << (b[1] >> 1 & 15), Generation: uint64(b[4]),
		}
		if b[1]&0x20 != 0 { // sectors
			h.Off, h.Len = h.Off*512, h.Len*512
		}
		h.Off, h.Len = h.Off%fuzzLimit, h.Len%fuzzLimit
		if b[6] == 255 {
			h.Off = 1<<63 - 1 - h.Off
		}
		if b[6] == 254 && h.Type != wire.Resize && h.Type != wire.BeginSync {
			h.Len = 1<<63 - 1 - h.Len
		}
		var payload []byte
		switch {
		case h.Type == wire.Write && h.Len <= 1<<20:
			payload = bytes.Repeat([]byte{b[5]}, int(h.Len))
		case h.Type == wire.Mend && h.Len <= 1<<20:
			payload = append(wire.MarshalID(uint32(b[5]%4)), bytes.Repeat([]byte{b[5]}, int(h.Len))...)
		case h.Type.HasID():
			payload = wire.MarshalID(uint32(b[5] % 4))
		}
		if b[6] == 253 {
			payload = append(payload, b[5])
		}
		h.Payload = uint32(len(payload))
		frame := make([]byte, wire.HeaderSize)
		h.Put(frame)
		if b[6] == 252 {
			frame[b[5]%wire.HeaderSize] ^= b[7]
		}
		out = append(append(out, frame...), payload...)
		frames++
	}
	return out, frames
}

// hello begins a session.
func hello(epoch uint64) []byte {
	payload := wire.Greeting{ClusterID: "c", VolumeID: "v", ReplicaID: 1, Epoch: epoch}.Marshal()
	b := make([]byte, wire.HeaderSize)
	wire.Header{Type: wire.Hello, Payload: uint32(len(payload))}.Put(b)
	return append(b, payload...)
}

// memory is a directory that costs no disk's time, where there is one.
func memory(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "argon-fuzz-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// FuzzFrames sends frames of every type on a session. The replica answers in
// the protocol's form or hangs up, never hangs or crashes; and whatever was
// asked of it, it opens again afterwards, as after a crash of its process, and
// serves another session.
func FuzzFrames(f *testing.F) {
	at := func(typ wire.Type, shape, off, length, generation, arg byte) []byte {
		return []byte{byte(typ), shape, off, length, generation, arg, 0, 0}
	}
	const regions = 15 << 1 // offsets and lengths in 32 KiB
	join := func(frames ...[]byte) (all []byte) {
		for _, b := range frames {
			all = append(all, b...)
		}
		return all
	}
	f.Add(join(at(wire.Write, 0x20, 1, 8, 2, 7), at(wire.Flush, 0, 0, 0, 0, 0), at(wire.Read, 0x20, 0, 16, 0, 0)))
	f.Add(join(at(wire.Write, regions, 0, 4, 1, 7), at(wire.Prepare, 0, 0, 0, 0, 0), at(wire.Snapshot, 0, 0, 0, 3, 1),
		at(wire.Write, 0x20, 3, 1, 3, 9), at(wire.ReadSnapshot, 0x20, 0, 16, 0, 1), at(wire.ChangedSnapshot, regions, 0, 64, 0, 1),
		at(wire.Revert, regions, 0, 64, 4, 1), at(wire.Snapshot, 0, 0, 0, 5, 2)))
	f.Add(join(at(wire.BeginSync, 0, 0, 0, 3, 0), at(wire.Resize, regions, 0, 200, 0, 0), at(wire.Zero, regions, 1, 90, 3, 0),
		at(wire.Trim, 0x21, 1, 9, 4, 0), at(wire.EndSync, 0, 0, 0, 0, 0), at(wire.Changed, regions, 0, 128, 0, 0)))
	f.Add(join(at(wire.Write, regions, 9, 9, 1, 1), at(wire.Sums, regions, 0, 128, 9, 0), at(wire.ReadVerified, regions, 0, 32, 0, 0), at(wire.Close, 0, 0, 0, 0, 0)))
	f.Add(join(at(wire.Write, regions, 0, 4, 1, 7), at(wire.Snapshot, 0, 0, 0, 3, 1), at(wire.Write, 0x20, 3, 1, 3, 9), at(wire.SnapshotSums, regions, 0, 64, 0, 1),
		at(wire.Mend, regions, 0, 32, 0, 1), at(wire.ReadSnapshotVerified, regions, 0, 64, 0, 1), at(wire.SnapshotSums, regions, 0, 64, 0, 1)))
	f.Add([]byte{byte(wire.Read), 0, 0, 0, 0, 0, 255, 0, byte(wire.Changed), 0, 0, 0, 0, 0, 254, 0, byte(wire.Ping), 0, 0, 0, 0, 3, 252, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 8*64 {
			return
		}
		opts := replica.Options{FS: layer.OS{}, Dir: memory(t), ClusterID: "c", BootID: "b", Log: slog.New(slog.DiscardHandler)}
		store, err := replica.Open(opts)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := store.Create(replica.CreateSpec{VolumeID: "v", ReplicaID: 1, Size: fuzzSize}); err != nil {
			t.Fatal(err)
		}
		frames, n := script(b)
		converse(t, store, append(hello(1), frames...), 1+n)
		if err := store.Close(); err != nil {
			t.Logf("closing: %v", err) // a replica may have been said to be broken
		}
		if store, err = replica.Open(opts); err != nil {
			t.Fatal(err)
		}
		ping := make([]byte, wire.HeaderSize)
		wire.Header{Type: wire.Ping}.Put(ping)
		if got := converse(t, store, append(hello(2), ping...), 2); got != 2 {
			t.Errorf("%d answers to a hello and a ping", got)
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
}

// converse sends a session, checks the form of what is answered, and counts it:
// all of it, or what comes before the server hangs up.
func converse(t *testing.T, store *replica.Store, session []byte, requests int) (answers int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	here, there := net.Pipe()
	_ = here.SetDeadline(time.Now().Add(time.Minute)) // a hang, not a measure
	var wg sync.WaitGroup
	defer wg.Wait()
	defer here.Close()
	wg.Go(func() { _ = replica.Serve(ctx, there, store) })
	wg.Go(func() { _, _ = here.Write(session) })
	head := make([]byte, wire.HeaderSize)
	for ; answers < requests; answers++ {
		h, err := wire.ReadHeader(here, head)
		if err == nil {
			_, err = io.CopyN(io.Discard, here, int64(h.Payload))
		}
		if errors.Is(err, wire.ErrFrame) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("after %d answers: %v", answers, err)
		}
		if err != nil {
			return answers
		}
	}
	return answers
}
