package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
	"github.com/argon-cluster/argon/internal/devcluster"
	"github.com/argon-cluster/argon/internal/devcluster/counter"
)

func (a *app) demoCommand() *cobra.Command {
	d := &demo{app: a}
	var keep bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See a machine survive the loss of its server, on this machine only",
		Long: `Starts servers on this machine, runs a machine on a replicated volume, kills its
server without warning, and proves that the machine runs again elsewhere with
every write that was acknowledged. Ends with exit code 0 only if all of that
was seen to be true. ` + "`make demo`" + ` builds what it needs.`,
		Example: "  argon demo\n  argon demo --servers 5 --keep",
		Args:    noArgs,
	}
	cmd.Flags().IntVar(&d.servers, "servers", 3, "how many; at least 3, so that a majority survives")
	cmd.Flags().StringVar(&d.guest, "guest", "build/tiny.img", "disk image, `FILE`, of the guest that counts")
	completeFiles(cmd, "guest")
	cmd.Flags().BoolVar(&keep, "keep", false, "leave the cluster up and say what to try next")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if d.servers < 3 {
			return usage(cmd, "--servers %d: with fewer than 3 no majority survives the loss of one", d.servers)
		}
		return nil
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if _, err := os.Stat(d.guest); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("demo: no guest image %s: `make demo` builds it, or name one with --guest", d.guest)
		}
		err := d.run(cmd.Context())
		if end := d.end(context.WithoutCancel(cmd.Context()), keep && err == nil); err == nil {
			err = end
		}
		return err
	}
	return cmd
}

// demo is one run. Its steps follow one another; each leaves here what the
// next ones need.
type demo struct {
	*app
	servers int
	guest   string

	cluster *devcluster.Cluster
	// home runs the machine at first and is killed; witness never runs it at
	// first, and is asked all the time.
	home, witness *devcluster.Server
	api           *client.Client // of witness
	watch         *countWatch
	killed        time.Time
	firstBoot     string
}

// The demo's machine.
const (
	demoMachine = "counter"
	demoImage   = "tiny"
	demoPort    = 8080
	demoMemory  = 128 << 20
	// demoCounts is how far the guest must count before its server is killed.
	demoCounts = 20
	// demoPatience bounds each wait; a demo that needs it has failed.
	demoPatience = 2 * time.Minute
)

func (d *demo) run(ctx context.Context) error {
	for _, step := range []struct {
		what string
		do   func(context.Context) (seen string, err error)
	}{
		{"start servers", d.up},
		{"import the image of a small Linux", d.importGuest},
		{"make a machine of it, its disk on two servers", d.create},
		{"let it write: it counts, each number fsynced, then told over HTTP", d.count},
		{"kill its server: SIGKILL to all its processes at once", d.kill},
		{"wait until it runs on another server", d.failover},
		{"wait until it counts again", d.countAgain},
		{"look for lost writes", d.prove},
	} {
		began := d.now()
		p := d.startProgress(step.what)
		bounded, cancel := context.WithTimeout(ctx, demoPatience)
		seen, err := step.do(bounded)
		cancel()
		p.Stop()
		if err != nil {
			return fmt.Errorf("demo: %s: %w", step.what, err)
		}
		fmt.Fprintf(d.out, "%6.2fs  %s\n         %s\n", d.now().Sub(began).Seconds(), step.what, seen)
	}
	return nil
}

// end takes everything down, or says what can be done with it.
func (d *demo) end(ctx context.Context, keep bool) error {
	if d.watch != nil {
		d.watch.stop()
	}
	if d.api != nil {
		d.api.Close()
	}
	if d.cluster == nil {
		return nil
	}
	if !keep {
		return d.cluster.Down(ctx, devcluster.KeepNothing)
	}
	dir := d.cluster.Dir()
	fmt.Fprintf(d.out, `
the cluster is left running; try:
  argon --dir %[2]s machine ls
  argon --dir %[2]s machine console %[3]s     # ctrl-] leaves
  curl http://%[4]s:%[5]d/
  argon dev --dir %[1]s start %[6]s           # the killed server comes back
  argon --dir %[2]s volume ls                # its replica is made equal again
  argon --dir %[2]s events -f
  argon dev --dir %[1]s down                 # end and remove it all
`, dir, d.witness.Dir, demoMachine, d.witness.Address, demoPort, d.home.Name)
	return nil
}

func (d *demo) up(ctx context.Context) (string, error) {
	c, err := devcluster.Up(ctx, devcluster.Options{Servers: d.servers})
	if err != nil {
		return "", err
	}
	d.cluster = c
	// Any server will do until it is known where the machine runs.
	d.witness = c.Servers()[0]
	if d.api, err = d.witness.Client(); err != nil {
		return "", err
	}
	var names []string
	for _, s := range c.Servers() {
		names = append(names, s.Name+" at "+s.Address)
	}
	return strings.Join(names, ", "), nil
}

func (d *demo) importGuest(ctx context.Context) (string, error) {
	header := &argonv1.ImportImageRequest_Header{Name: demoImage}
	data, err := d.openImage(d.guest, header)
	if err != nil {
		return "", err
	}
	defer data.Close()
	image, err := importImage(ctx, d.api, header, data, func(string, uint64, uint64) {})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("image %s, %s", demoImage, formatBytes(image.GetSizeBytes())), nil
}

func (d *demo) create(ctx context.Context) (string, error) {
	_, err := client.Call(ctx, d.api.Machines.CreateMachine, &argonv1.CreateMachineRequest{
		Name: demoMachine, Image: demoImage, Replicas: 2, MemoryBytes: demoMemory,
		Ports: []*argonv1.PublishedPort{{ClusterPort: demoPort, GuestPort: guestPort}},
	})
	if err != nil {
		return "", err
	}
	v, err := pollMachine(ctx, d.api, demoMachine, waitFlags{timeout: demoPatience}, toRun(), func(string) {})
	if err != nil {
		return "", err
	}
	if d.home, err = d.cluster.Server(v.GetServerName()); err != nil {
		return "", err
	}
	return fmt.Sprintf("machine %s runs on %s (%s)", demoMachine, d.home.Name, v.GetMachine().GetStatus().GetAcceleration()), d.moveAway()
}

// moveAway asks another server than the one that will be killed from now on.
func (d *demo) moveAway() error {
	for _, s := range d.cluster.Servers() {
		if s != d.home {
			d.witness = s
			break
		}
	}
	d.api.Close()
	var err error
	d.api, err = d.witness.Client()
	return err
}

func (d *demo) count(ctx context.Context) (string, error) {
	d.watch = startWatch(d.cluster, d.witness.Address, demoPort)
	first, err := d.watch.until(ctx, func(counter.Report) bool { return true })
	if err != nil {
		return "", err
	}
	d.firstBoot = first.Boot
	now, err := d.watch.until(ctx, func(r counter.Report) bool { return r.Count >= first.Count+demoCounts })
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("http://%s:%d/ (any server's address will do) told %d, then %d", d.witness.Address, demoPort, first.Count, now.Count), nil
}

func (d *demo) kill(ctx context.Context) (string, error) {
	d.killed = d.now()
	if err := d.home.Kill(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s is gone; the last number told was %d", d.home.Name, d.watch.highest(d.firstBoot)), nil
}

func (d *demo) failover(ctx context.Context) (string, error) {
	elsewhere := toRun()
	elsewhere.reached = func(m *argonv1.Machine) bool { return isRunning(m) && m.GetStatus().GetStarts() > 1 }
	v, err := pollMachine(ctx, d.api, demoMachine, waitFlags{timeout: demoPatience}, elsewhere, func(string) {})
	if err != nil {
		return "", err
	}
	if v.GetServerName() == d.home.Name {
		return "", fmt.Errorf("machine %s is said to run on %s, which was killed", demoMachine, d.home.Name)
	}
	return fmt.Sprintf("machine %s runs on %s, %.2fs after the kill", demoMachine, v.GetServerName(), d.now().Sub(d.killed).Seconds()), nil
}

func (d *demo) countAgain(ctx context.Context) (string, error) {
	again, err := d.watch.until(ctx, func(r counter.Report) bool { return r.Boot != d.firstBoot })
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("it told %d, %.2fs after the kill", again.Count, d.now().Sub(d.killed).Seconds()), nil
}

// prove compares what the guest had told by the time it was killed with what
// it found on its disk when it started again.
func (d *demo) prove(ctx context.Context) (string, error) {
	now, err := d.watch.until(ctx, func(r counter.Report) bool { return r.Boot != d.firstBoot })
	if err != nil {
		return "", err
	}
	promised := d.watch.highest(d.firstBoot)
	if now.Found < promised {
		return "", fmt.Errorf("LOST: the guest had told %d before the kill, and found only %d on its disk", promised, now.Found)
	}
	return fmt.Sprintf("none: told before the kill: %d; found on its disk at boot: %d", promised, now.Found), nil
}
