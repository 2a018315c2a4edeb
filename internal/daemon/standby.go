package daemon

import (
	"context"
	"sync"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/agent"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/nbd"
	"github.com/argon-cluster/argon/internal/volume/standby"
)

// standbyAttachment is a volume's socket before the volume is attached here. See
// agent.Volumes.
type standbyAttachment struct {
	disk    hypervisor.Disk
	device  *standby.Device
	nbd     *nbd.Server
	stopNBD context.CancelFunc
	forget  func()
	ready   chan struct{}
	done    chan struct{}
	once    sync.Once
}

// StandBy implements agent.Volumes.
func (v *volumes) StandBy(ctx context.Context, volumeID, machineID string, size int64) (agent.Attachment, error) {
	path := v.paths.nbd(volumeID)
	ln, err := v.sockets.listen(ctx, path, machineID)
	if err != nil {
		return nil, err
	}
	s := &standbyAttachment{
		disk: diskOf(volumeID, path), device: standby.New(size), forget: v.forget(ctx, path),
		ready: make(chan struct{}), done: make(chan struct{}),
	}
	close(s.ready)
	serving, stop := context.WithCancel(context.Background())
	s.stopNBD = stop
	s.nbd, err = nbd.Serve(serving, nbd.Options{
		Listener: ln, Device: s.device, Export: volumeID, Log: v.log.With("volume", volumeID),
	})
	if err != nil {
		stop()
		return nil, err
	}
	return s, nil
}

// become hands what waits, and the clients, over to an attachment.
func (s *standbyAttachment) become(m *mirror.Attachment) *attachment {
	s.device.Give(m)
	return newAttachment(m, s.nbd, s.stopNBD, s.disk, func() {
		s.device.Close()
		s.forget()
	})
}

// Disk implements agent.Attachment.
func (s *standbyAttachment) Disk() hypervisor.Disk { return s.disk }

// Device implements agent.Attachment.
func (s *standbyAttachment) Device() volume.Device { return s.device }

// Ready implements agent.Attachment.
func (s *standbyAttachment) Ready() <-chan struct{} { return s.ready }

// Done implements agent.Attachment.
func (s *standbyAttachment) Done() <-chan struct{} { return s.done }

// Err implements agent.Attachment.
func (s *standbyAttachment) Err() error { return nil }

// Detach implements agent.Attachment: what waits is for nobody any more.
func (s *standbyAttachment) Detach(context.Context) error {
	s.Abandon()
	return nil
}

// Abandon implements agent.Attachment.
func (s *standbyAttachment) Abandon() {
	s.once.Do(func() {
		s.stopNBD()
		s.device.Close()
		// Its only error is about the socket's end, which is its own to log.
		_ = s.nbd.Close()
		s.forget()
		close(s.done)
	})
}

// Status implements agent.Attachment.
func (s *standbyAttachment) Status() *argonv1.VolumeStatus {
	return &argonv1.VolumeStatus{Condition: "serving"}
}
