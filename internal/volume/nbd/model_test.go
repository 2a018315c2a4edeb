package nbd_test

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/nbd/nbdtest"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// modelSize is small, so that requests touch each other often.
const modelSize = 64 << 10

// pipeline sends random requests over several connections, many at a time, and
// keeps a model of what the device must hold. Requests in flight at the same
// time never conflict, as the device may carry them out in any order.
type pipeline struct {
	t       *rapid.T
	clients []*nbdtest.Client
	model   []byte
	flying  map[*nbdtest.Call][]byte // with what a read must return
	done    chan *nbdtest.Call
}

func (p *pipeline) step() {
	call := p.draw()
	for p.conflicts(call) {
		p.await()
	}
	var want []byte
	place := p.model[call.Off : call.Off+call.Len]
	switch call.Command {
	case proto.CmdRead:
		want = bytes.Clone(place)
	case proto.CmdWrite:
		copy(place, call.Data)
	case proto.CmdTrim, proto.CmdWriteZeroes:
		clear(place)
	}
	p.flying[call] = want
	rapid.SampledFrom(p.clients).Draw(p.t, "client").Go(call)
}

func (p *pipeline) draw() *nbdtest.Call {
	call := &nbdtest.Call{
		Command: rapid.SampledFrom([]proto.Command{
			proto.CmdRead, proto.CmdRead, proto.CmdWrite, proto.CmdWrite, proto.CmdTrim, proto.CmdWriteZeroes, proto.CmdFlush,
		}).Draw(p.t, "command"),
		Done: p.done,
	}
	if call.Command == proto.CmdFlush {
		return call
	}
	const sectors = modelSize / volume.SectorSize
	first := rapid.IntRange(0, sectors).Draw(p.t, "first")
	n := rapid.IntRange(0, sectors-first).Draw(p.t, "sectors")
	call.Off, call.Len = int64(first)*volume.SectorSize, int64(n)*volume.SectorSize
	switch call.Command {
	case proto.CmdRead:
		call.Data = make([]byte, call.Len)
	case proto.CmdWrite:
		call.Data = pattern(int(call.Len), rapid.Byte().Draw(p.t, "data"))
	}
	if call.Command != proto.CmdRead && rapid.Bool().Draw(p.t, "FUA") {
		call.Flags = proto.CmdFlagFUA
	}
	return call
}

func (p *pipeline) conflicts(call *nbdtest.Call) bool {
	for other := range p.flying {
		overlap := call.Off < other.Off+other.Len && other.Off < call.Off+call.Len
		if overlap && !(call.Command == proto.CmdRead && other.Command == proto.CmdRead) {
			return true
		}
	}
	return false
}

func (p *pipeline) await() {
	call := <-p.done
	if call.Err != nil {
		p.t.Fatalf("command %d of %d bytes at %d: %v", call.Command, call.Len, call.Off, call.Err)
	}
	if want := p.flying[call]; call.Command == proto.CmdRead && !bytes.Equal(call.Data, want) {
		p.t.Fatalf("read of %d bytes at %d returned something else than the model has", call.Len, call.Off)
	}
	delete(p.flying, call)
}

func TestEqualsModel(t *testing.T) {
	d := memDevice(t)
	path, _ := serve(t, d)
	structured, simple := dial(t, path, nbdtest.Options{}), dial(t, path, nbdtest.Options{Simple: true})
	rapid.Check(t, func(t *rapid.T) {
		if err := structured.Zero(0, modelSize); err != nil {
			t.Fatal(err)
		}
		const steps = 60
		p := &pipeline{
			t: t, clients: []*nbdtest.Client{structured, simple}, model: make([]byte, modelSize),
			flying: make(map[*nbdtest.Call][]byte), done: make(chan *nbdtest.Call, steps),
		}
		for range rapid.IntRange(1, steps).Draw(t, "steps") {
			p.step()
		}
		for len(p.flying) > 0 {
			p.await()
		}
		if err := simple.Flush(); err != nil {
			t.Fatal(err)
		}
		d.PowerCut()
		if !bytes.Equal(d.Bytes()[:modelSize], p.model) {
			t.Fatal("the device holds something else than the model")
		}
	})
}
