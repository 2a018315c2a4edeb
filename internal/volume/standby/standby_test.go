package standby

import (
	"bytes"
	"errors"
	"testing"

	"go.uber.org/goleak"

	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/volumetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const size = 1 << 20

func submit(d volume.Device, op volume.Op, off int64, data []byte) <-chan error {
	done := make(chan error, 1)
	d.Submit(&volume.Request{Op: op, Off: off, Len: int64(len(data)), Data: data, Done: func(err error) { done <- err }})
	return done
}

// Requests wait, and are carried out once there is a device, as are those that
// come later.
func TestGive(t *testing.T) {
	d, disk := New(size), volumetest.New(2*size, 1)
	defer disk.Close()
	defer d.Close()
	if d.Size() != size {
		t.Errorf("its size is %d", d.Size())
	}
	data := bytes.Repeat([]byte("x"), 512)
	write := submit(d, volume.OpWrite, 512, data)
	select {
	case err := <-write:
		t.Fatalf("it was answered before there was a disk: %v", err)
	default:
	}
	d.Give(disk)
	if err := <-write; err != nil {
		t.Fatal(err)
	}
	read := make([]byte, 512)
	if err := <-submit(d, volume.OpRead, 512, read); err != nil || !bytes.Equal(read, data) {
		t.Errorf("what was written is not there: %v", err)
	}
	if d.Size() != 2*size {
		t.Errorf("its size is %d, the disk's %d", d.Size(), disk.Size())
	}
}

// More requests wait than the device takes at once.
func TestGiveManyToAStalledDevice(t *testing.T) {
	d, disk := New(size), volumetest.New(size, 1)
	defer disk.Close()
	defer d.Close()
	var answers []<-chan error
	for range 2000 {
		answers = append(answers, submit(d, volume.OpWrite, 0, make([]byte, 512)))
	}
	disk.Stall()
	d.Give(disk)
	disk.Resume()
	for _, done := range answers {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

// What waits when it is closed fails, and so does what comes later.
func TestClose(t *testing.T) {
	d := New(size)
	write := submit(d, volume.OpWrite, 0, make([]byte, 512))
	d.Close()
	if err := <-write; !errors.Is(err, volume.ErrClosed) {
		t.Errorf("got %v", err)
	}
	disk := volumetest.New(size, 1)
	defer disk.Close()
	d.Give(disk)
	if err := <-submit(d, volume.OpFlush, 0, nil); !errors.Is(err, volume.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}
