package nbd_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/nbd/nbdtest"
	"github.com/argon-cluster/argon/internal/volume/nbd/proto"
)

// instant is a device that does nothing and is done before Submit returns:
// what is left to measure is the server.
type instant struct{}

func (instant) Size() int64              { return 1 << 30 }
func (instant) Submit(r *volume.Request) { r.Done(nil) }

// handover is a device that does nothing on another goroutine, as one has to
// that waits for disks or other servers.
type handover struct{ requests chan *volume.Request }

func newHandover(b *testing.B) handover {
	d := handover{make(chan *volume.Request, 1024)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for r := range d.requests {
			r.Done(nil)
		}
	})
	b.Cleanup(func() {
		close(d.requests)
		wg.Wait()
	})
	return d
}

func (handover) Size() int64                { return 1 << 30 }
func (d handover) Submit(r *volume.Request) { d.requests <- r }

// BenchmarkServer includes what the client costs, which runs on the same
// processors.
func BenchmarkServer(b *testing.B) {
	for _, device := range []string{"instant", "handover"} {
		for _, cmd := range []proto.Command{proto.CmdRead, proto.CmdWrite} {
			for _, size := range []int{4 << 10, 128 << 10} {
				for _, depth := range []int{1, 32} {
					name := fmt.Sprintf("%s/%s/%dk/depth=%d", device, map[proto.Command]string{proto.CmdRead: "read", proto.CmdWrite: "write"}[cmd], size>>10, depth)
					b.Run(name, func(b *testing.B) {
						var d volume.Device = instant{}
						if device == "handover" {
							d = newHandover(b)
						}
						path, _ := serve(b, d)
						benchmark(b, dial(b, path, nbdtest.Options{}), cmd, size, depth)
					})
				}
			}
		}
	}
}

func benchmark(b *testing.B, c *nbdtest.Client, cmd proto.Command, size, depth int) {
	b.SetBytes(int64(size))
	b.ReportAllocs()
	done := make(chan *nbdtest.Call, depth)
	for i := range depth {
		done <- &nbdtest.Call{Command: cmd, Data: make([]byte, size), Off: int64(i * size), Done: done}
	}
	for b.Loop() {
		call := <-done
		if call.Err != nil {
			b.Fatal(call.Err)
		}
		c.Go(call)
	}
	b.StopTimer()
	for range depth {
		<-done
	}
}
