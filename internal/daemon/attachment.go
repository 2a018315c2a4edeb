package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"github.com/argon-cluster/argon/internal/agent"
	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/volume"
	"github.com/argon-cluster/argon/internal/volume/mirror"
	"github.com/argon-cluster/argon/internal/volume/nbd"
)

// attachment is a volume that this server holds, with the socket that it is
// served on. See agent.Attachment.
type attachment struct {
	*mirror.Attachment
	disk hypervisor.Disk
	nbd  *nbd.Server
	// stopNBD makes the socket take no more requests, without waiting for
	// those under way.
	stopNBD context.CancelFunc
	// forget is called when the attachment is over.
	forget func()
	watch  sync.WaitGroup
	ended  sync.Once
}

// serveNBD serves an attachment, which it owns from then on unless it fails.
func serveNBD(m *mirror.Attachment, volumeID, socket string, ln net.Listener, forget func(), log *slog.Logger) (*attachment, error) {
	ctx, stop := context.WithCancel(context.Background())
	server, err := nbd.Serve(ctx, nbd.Options{
		Listener: ln, Device: m, Export: volumeID, Log: log.With("volume", volumeID),
	})
	if err != nil {
		stop()
		return nil, fmt.Errorf("serving volume %s: %w", volumeID, err)
	}
	return newAttachment(m, server, stop, diskOf(volumeID, socket), forget), nil
}

// newAttachment is an attachment with the server in front of it.
func newAttachment(m *mirror.Attachment, server *nbd.Server, stop context.CancelFunc, disk hypervisor.Disk, forget func()) *attachment {
	a := &attachment{Attachment: m, nbd: server, stopNBD: stop, forget: forget, disk: disk}
	a.watch.Go(func() {
		<-m.Done()
		stop()
	})
	return a
}

func diskOf(volumeID, socket string) hypervisor.Disk {
	return hypervisor.Disk{Socket: socket, Export: volumeID, Serial: serial(volumeID)}
}

// serial is what a guest sees: the end of the id, which is the random part.
func serial(volumeID string) string {
	const most = 20
	return volumeID[max(0, len(volumeID)-most):]
}

// Disk implements agent.Attachment.
func (a *attachment) Disk() hypervisor.Disk { return a.disk }

// Device implements agent.Attachment.
func (a *attachment) Device() volume.Device { return a.Attachment }

// Err implements agent.Attachment.
func (a *attachment) Err() error { return startAfresh(a.Attachment.Err()) }

// startAfresh tells the agent when a guest must not go on.
func startAfresh(err error) error {
	if errors.Is(err, mirror.ErrRestarted) {
		return fmt.Errorf("%w: %w", agent.ErrStartAfresh, err)
	}
	return err
}

// Detach implements agent.Attachment: first no more requests come in, then
// those under way end, then the clients have their answers.
func (a *attachment) Detach(ctx context.Context) error {
	a.stopNBD()
	err := a.Attachment.Detach(ctx)
	a.end()
	return err
}

// Abandon implements agent.Attachment.
func (a *attachment) Abandon() {
	a.stopNBD()
	a.Attachment.Abandon()
	a.end()
}

// end waits for what is left; the attachment is over.
func (a *attachment) end() {
	a.ended.Do(func() {
		// Its only error is about the socket's end, which is its own to log.
		_ = a.nbd.Close()
		a.watch.Wait()
		a.forget()
	})
}
