package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// This file: `argon machine create`.

func (a *app) machineCreateCommand() *cobra.Command {
	var flags createFlags
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a machine and start it",
		Long: `Makes a machine and starts it on a server that the cluster chooses. Its first
disk is made from an image, or it takes volumes that exist; the first one boots.
If its server is lost, it starts again on another.

An image with cloud-init finds the machine's name, and the user, keys and data
that are given. What an OVA said of processors, memory and firmware is the
default for its image.`,
		Example: `  argon machine create web --image debian --disk 10GiB --publish 8080:80
  argon machine create web --image https://example.org/debian-12.qcow2
  argon machine create web --image debian --user alice --ssh-key ~/.ssh/id_ed25519.pub
  argon machine create db --volume db-root --volume db-data --cpus 4 --memory 8GiB
  argon machine create spare --image debian --replicas 3 --stopped
  argon machine create near --image debian --on s2`,
		Args: takes("NAME"),
	}
	f := addFormat(cmd)
	flags.add(a, cmd)
	wait.add(cmd)
	var req *argonv1.CreateMachineRequest
	cmd.PreRunE = func(cmd *cobra.Command, args []string) (err error) {
		req, err = flags.request(cmd, args[0])
		return err
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, _ []string) error {
		var err error
		if req.Image, err = a.namedImage(ctx, c, req.GetImage()); err != nil {
			return err
		}
		res, err := waiting(ctx, a, "making machine "+req.GetName(), c.Machines.CreateMachine, req)
		if err != nil {
			return err
		}
		a.warn(res.GetWarnings())
		if req.GetStopped() {
			return a.printMachine(*f, res.GetMachine())
		}
		return a.waitAndPrint(ctx, c, req.GetName(), wait, toRun(), *f)
	})
	return cmd
}

// createFlags say what a new machine is to be.
type createFlags struct {
	req          argonv1.CreateMachineRequest // what needs no reading
	memory, disk wholeSize
	ports        []string
	stopTimeout  time.Duration
	boot         bootFlags
	shares       shareFlags
	keep         keeping
}

func (c *createFlags) add(a *app, cmd *cobra.Command) {
	c.memory, c.disk = memorySize(512<<20), diskSize()
	flags := cmd.Flags()
	flags.StringVar(&c.req.Image, "image", "", "make the boot disk from this image; `NAME|FILE|URL`: with a slash in it, it is imported first")
	flags.Var(&c.disk, "disk", "size of that disk, such as 20GiB; a number alone is GiB (default: the image's)")
	flags.Uint32Var(&c.req.Replicas, "replicas", 2, "how many servers keep a copy of that disk: 1, 2 or 3")
	flags.StringArrayVar(&c.req.Volumes, "volume", nil, "use this volume; repeated, the first one boots")
	flags.Uint32Var(&c.req.Cpus, "cpus", 1, "virtual processors")
	flags.Var(&c.memory, "memory", "such as 1GiB; a number alone is MiB")
	addPublish(cmd, &c.ports)
	flags.StringVar(&c.req.On, "on", "", "start it on this server first (default: the cluster chooses)")
	a.completeFlag(cmd, "on", serverNames)
	flags.StringVar(&c.req.Acceleration, "acceleration", "auto", "auto, kvm or tcg")
	flags.StringVar(&c.req.Firmware, "firmware", "bios", "bios or uefi")
	flags.Uint32Var(&c.req.Networks, "networks", 1, "how many network interfaces; ports are published from the first")
	flags.BoolVar(&c.req.Stopped, "stopped", false, "do not start it")
	flags.DurationVar(&c.stopTimeout, "stop-timeout", time.Minute, "how long a stop may take before it is forced")
	c.shares.add(flags)
	c.keep.add(cmd, keeping{onLoss: "restart", kept: 6})
	c.boot.add(cmd)
	a.completeFlag(cmd, "image", imageNames)
	a.completeFlag(cmd, "volume", volumeNames)
	completeWords(cmd, "firmware", "bios", "uefi")
	completeWords(cmd, "acceleration", "auto", "kvm", "tcg")
}

// request reads the flags. An image's hints count where the user said nothing.
func (c *createFlags) request(cmd *cobra.Command, name string) (*argonv1.CreateMachineRequest, error) {
	req := &c.req
	req.Name, req.DiskBytes, req.Shares, req.CheckpointsKept = name, c.disk.bytes, c.shares.shares(), c.keep.kept
	var err error
	if req.Ports, err = parsePorts(c.ports); err != nil {
		return nil, usage(cmd, "%v", err)
	}
	if req.OnLoss, req.CheckpointEverySeconds, err = c.keep.read(cmd); err != nil {
		return nil, err
	}
	if req.StopTimeoutSeconds, err = wholeSeconds(c.stopTimeout); err != nil {
		return nil, usage(cmd, "--stop-timeout %v: %v", c.stopTimeout, err)
	}
	if req.FirstBoot, err = c.boot.firstBoot(); err != nil {
		return nil, usage(cmd, "%v", err)
	}
	switch {
	case req.GetImage() == "" && len(req.GetVolumes()) == 0:
		return nil, usage(cmd, "nothing to boot from: give --image or --volume")
	case req.GetCpus() == 0 || c.memory.bytes == 0:
		return nil, usage(cmd, "a machine needs at least one of --cpus and some --memory")
	}
	if cmd.Flags().Changed("memory") {
		req.MemoryBytes = c.memory.bytes
	}
	if !cmd.Flags().Changed("cpus") {
		req.Cpus = 0
	}
	if !cmd.Flags().Changed("firmware") {
		req.Firmware = ""
	}
	if !cmd.Flags().Changed("networks") {
		req.Networks = 0
	}
	return req, checkReplicas(cmd, req.GetReplicas())
}

// addPublish gives a command the flag that publishes ports.
func addPublish(cmd *cobra.Command, ports *[]string) {
	cmd.Flags().StringArrayVarP(ports, "publish", "p", nil, "reach the machine's TCP port at every server's address, `CLUSTER:GUEST`; repeated")
}

// parsePorts reads CLUSTER:GUEST pairs, or one number for both.
func parsePorts(specs []string) ([]*argonv1.PublishedPort, error) {
	var ports []*argonv1.PublishedPort
	for _, spec := range specs {
		cluster, guest, pair := strings.Cut(spec, ":")
		if !pair {
			guest = cluster
		}
		from, errFrom := strconv.ParseUint(cluster, 10, 16)
		to, errTo := strconv.ParseUint(guest, 10, 16)
		if errFrom != nil || errTo != nil || from == 0 || to == 0 {
			return nil, fmt.Errorf("--publish %q is not CLUSTER:GUEST, two TCP ports such as 8080:80", spec)
		}
		ports = append(ports, &argonv1.PublishedPort{ClusterPort: uint32(from), GuestPort: uint32(to)})
	}
	return ports, nil
}
