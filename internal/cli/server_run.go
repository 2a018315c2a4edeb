package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/argon-cluster/argon/internal/cgroup"
	"github.com/argon-cluster/argon/internal/daemon"
	"github.com/argon-cluster/argon/internal/guard"
	"github.com/argon-cluster/argon/internal/logfile"
)

// serverFlags are those of `argon server`, the same for guard and daemon: the
// guard hands them down as they came.
type serverFlags struct {
	runDir, address, qemu, logLevel, role string
	watchdog                              string
	stopTimeout                           time.Duration
	apiPort, dataPort, peerPort, etcdPort int
}

func (f *serverFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.runDir, "run-dir", "", "directory of sockets (default "+daemon.DefaultRunDir("/var/lib/argon")+", or DIR/run)")
	flags.StringVar(&f.address, "address", "", "IP address or name that other servers reach this one at (default: found by init and join, then kept)")
	flags.IntVar(&f.apiPort, "api-port", 0, "TCP port of the API and for joining"+portDefault(daemon.DefaultAPIPort))
	flags.IntVar(&f.dataPort, "data-port", 0, "TCP port of volume data"+portDefault(daemon.DefaultDataPort))
	flags.IntVar(&f.peerPort, "peer-port", 0, "TCP port between voters"+portDefault(daemon.DefaultPeerPort))
	flags.IntVar(&f.etcdPort, "etcd-port", 0, "TCP port of the catalog"+portDefault(daemon.DefaultEtcdPort))
	flags.StringVar(&f.qemu, "qemu", "", "`PROGRAM` that runs machines (default qemu-system-x86_64)")
	flags.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&f.watchdog, "watchdog", "", "`DEVICE` that resets this host unless it is fed, such as /dev/watchdog")
	flags.DurationVar(&f.stopTimeout, "stop-timeout", time.Minute, "how long a stop may wait for machines that move away or shut down; 0: not at all")
	completeFiles(cmd, "run-dir", "qemu", "watchdog")
	completeWords(cmd, "log-level", "debug", "info", "warn", "error")
	flags.StringVar(&f.role, "role", "", "")
	_ = flags.MarkHidden("role")
}

func portDefault(port int) string { return " (default " + strconv.Itoa(port) + ")" }

// check refuses what no server can be started with.
func (f *serverFlags) check(cmd *cobra.Command) (slog.Level, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return level, usage(cmd, "--log-level %s is none of debug, info, warn, error", f.logLevel)
	}
	for _, p := range []struct {
		flag string
		port int
	}{{"api", f.apiPort}, {"data", f.dataPort}, {"peer", f.peerPort}, {"etcd", f.etcdPort}} {
		if p.port < 0 || p.port > 65535 {
			return level, usage(cmd, "--%s-port %d: use 1 to 65535", p.flag, p.port)
		}
	}
	if f.stopTimeout < 0 || f.stopTimeout > time.Hour {
		return level, usage(cmd, "--stop-timeout %v: use 0 to 1h", f.stopTimeout)
	}
	if f.role != "" && f.role != "daemon" {
		return level, usage(cmd, "--role %s is unknown", f.role)
	}
	return level, nil
}

// runServer is `argon server`: the guard, which starts this program again as
// the daemon.
func (a *app) runServer(cmd *cobra.Command, f *serverFlags) error {
	level, err := f.check(cmd)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level}))
	if f.role == "daemon" {
		ctx, stop := restartOnHangup(cmd.Context())
		defer stop()
		return daemon.RunUnderGuard(ctx, daemon.Options{
			Dir: a.dir, RunDir: f.runDir, Address: f.address,
			APIPort: f.apiPort, DataPort: f.dataPort, PeerPort: f.peerPort, EtcdPort: f.etcdPort,
			StopTimeout: f.stopTimeout, Version: a.version, Log: log,
		}, f.qemu)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	// The guard's own lines, and what the daemon says, its last words among it.
	output := logfile.New(daemon.LogDir(a.dir), a.err)
	defer output.Close()
	log = slog.New(slog.NewTextHandler(output, &slog.HandlerOptions{Level: level}))
	restart := make(chan os.Signal, 1)
	signal.Notify(restart, syscall.SIGHUP)
	defer signal.Stop(restart)
	err = guard.Run(cmd.Context(), guard.Options{
		Daemon: f.daemonArgs(self, a.dir), Groups: cgroup.Options{Name: cgroup.ServerName(a.dir)}, Watchdog: f.watchdog, Restart: restart, StopTimeout: f.stopTimeout, Final: exitFinal, Output: output, Log: log.With("part", "guard"),
	})
	if exit := (*guard.ExitError)(nil); errors.As(err, &exit) {
		return &toldError{code: exit.Code} // it has said why
	}
	return err
}

// restartOnHangup ends the context when the guard says that another daemon
// follows.
func restartOnHangup(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		select {
		case <-hangup:
			cancel(daemon.ErrRestart)
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		signal.Stop(hangup)
		cancel(nil)
		waiting.Wait()
	}
}

// daemonArgs is the daemon's command line.
func (f *serverFlags) daemonArgs(self, dir string) []string {
	args := []string{self, "server", "--role=daemon", "--dir", dir, "--log-level", f.logLevel, "--stop-timeout", f.stopTimeout.String()}
	for _, o := range []struct{ flag, value string }{
		{"run-dir", f.runDir}, {"address", f.address}, {"qemu", f.qemu},
	} {
		if o.value != "" {
			args = append(args, "--"+o.flag, o.value)
		}
	}
	for _, o := range []struct {
		flag string
		port int
	}{{"api", f.apiPort}, {"data", f.dataPort}, {"peer", f.peerPort}, {"etcd", f.etcdPort}} {
		if o.port != 0 {
			args = append(args, "--"+o.flag+"-port", strconv.Itoa(o.port))
		}
	}
	return args
}
