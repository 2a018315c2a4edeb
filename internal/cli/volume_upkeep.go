package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

// This file: `argon volume resize|detach-base|scrub`.

func (a *app) volumeResizeCommand() *cobra.Command {
	req := &argonv1.ResizeVolumeRequest{}
	size := diskSize()
	cmd := &cobra.Command{
		Use:   "resize NAME SIZE",
		Short: "Let a volume grow, also while it is used",
		Long: `Lets a volume grow, also while it is used. It can't become smaller: what lies
beyond the new end would be lost.`,
		Example:           "  argon volume resize db 40GiB",
		Args:              takes("NAME", "SIZE"),
		ValidArgsFunction: a.complete(volumeNames),
	}
	f := addFormat(cmd)
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if err := size.Set(args[1]); err != nil {
			return usage(cmd, "SIZE %v", err)
		}
		a.tellSize("SIZE", size)
		return nil
	}
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		req.Name, req.SizeBytes = args[0], size.bytes
		res, err := waiting(ctx, a, "volume "+req.GetName()+" is growing", c.Volumes.ResizeVolume, req)
		if err != nil {
			return err
		}
		return a.printVolume(*f, res.GetVolume())
	})
	return cmd
}

func (a *app) printVolume(f format, v *argonv1.VolumeView) error {
	return printOne(a, f, v, a.volumeColumns())
}

func (a *app) volumeDetachCommand() *cobra.Command {
	var noWait bool
	cmd := &cobra.Command{
		Use:   "detach-base NAME",
		Short: "Copy what a clone needs of its base, and be free of it",
		Long: `Copies what a clone still reads from its image or snapshot into the clone, and
waits until that is done. It goes on in the background if this command is
interrupted, also while the volume is used. Then the image or the snapshot can
be removed.`,
		Example:           "  argon volume detach-base test\n  argon volume detach-base test --no-wait",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(volumeNames),
	}
	f := addFormat(cmd)
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return at once")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Volumes.DetachBase, &argonv1.DetachBaseRequest{Name: args[0]})
		if err != nil {
			return err
		}
		view := res.GetVolume()
		if !noWait {
			view, err = a.pollVolume(ctx, c, args[0], func(v *argonv1.Volume) bool { return v.GetBase() == nil })
			if err != nil {
				return err
			}
		}
		return a.printVolume(*f, view)
	})
	return cmd
}

func (a *app) volumeScrubCommand() *cobra.Command {
	var wait bool
	cmd := &cobra.Command{
		Use:   "scrub NAME",
		Short: "Compare a volume's replicas, and repair what differs",
		Long: `Compares a volume's replicas, and its snapshots, by checksums, in the background
and at a gentle pace, and repairs a region that differs where it can be told
which copy is good. Each volume is scrubbed once a week without being asked; see
argon cluster set.`,
		Example:           "  argon volume scrub db --wait\n  argon volume show db",
		Args:              takes("NAME"),
		ValidArgsFunction: a.complete(volumeNames),
	}
	f := addFormat(cmd)
	cmd.Flags().BoolVar(&wait, "wait", false, "return once it is done; fail if a region differs and nothing tells which copy is right")
	cmd.RunE = a.withClient(func(ctx context.Context, c *client.Client, args []string) error {
		res, err := client.Call(ctx, c.Volumes.ScrubVolume, &argonv1.ScrubVolumeRequest{Name: args[0]})
		if err != nil {
			return err
		}
		view := res.GetVolume()
		if wait {
			view, err = a.pollVolume(ctx, c, args[0], func(v *argonv1.Volume) bool { return v.GetScrub().GetFinished() >= res.GetNumber() })
			if err != nil {
				return err
			}
		}
		s := view.GetVolume().GetScrub()
		switch {
		case *f != formatTable:
			err = printData(a, *f, view)
		case !wait:
			fmt.Fprintf(a.out, "volume %s: a scrub was asked for: see `argon volume show %s`\n", args[0], args[0])
		default:
			fmt.Fprintf(a.out, "volume %s: %s compared, %d repaired\n", args[0], english.Plural(int(s.GetRegions()), "region", ""), s.GetRepaired())
		}
		if wait && s.GetUnclear() > 0 {
			return errors.Join(err, fmt.Errorf("volume %s: %s, and nothing tells which copy is right", args[0], regionsDiffer(s.GetUnclear())))
		}
		return err
	})
	return cmd
}

// pollVolume looks until the volume is as wanted, and shows what is going on
// with it.
func (a *app) pollVolume(ctx context.Context, c *client.Client, name string, want func(*argonv1.Volume) bool) (*argonv1.VolumeView, error) {
	p := a.startProgress("volume " + name)
	defer p.Stop()
	var found *argonv1.VolumeView
	err := poll(ctx, func() (bool, error) {
		res, err := client.Call(ctx, c.Volumes.GetVolume, &argonv1.GetVolumeRequest{Name: name})
		if err != nil {
			return false, err
		}
		found = res.GetVolume()
		p.Set(strings.TrimSuffix("volume "+name+": "+strings.Join(found.GetActivity(), "; "), ": "))
		return want(found.GetVolume()), nil
	})
	return found, err
}

// poll asks until it is done.
func poll(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// removeBase removes an image or a snapshot, and waits until the clones that it
// first has to be without are.
func (a *app) removeBase(
	ctx context.Context, c *client.Client, title string, noWait bool,
	remove func() (waitsFor []string, err error), gone func() (bool, error),
) error {
	waitsFor, err := remove()
	switch {
	case err != nil:
		return err
	case len(waitsFor) > 0 && noWait:
		fmt.Fprintf(a.out, "%s is removed once volume %s is detached from it\n", title, strings.Join(waitsFor, ", "))
		return nil
	case len(waitsFor) > 0:
		if err := a.pollGone(ctx, c, "removing "+title, waitsFor, gone); err != nil {
			return err
		}
	}
	fmt.Fprintf(a.out, "%s removed\n", title)
	return nil
}

// pollGone waits until something does not exist any more, while the volumes
// that it waits for are detached from it.
func (a *app) pollGone(ctx context.Context, c *client.Client, what string, waitsFor []string, gone func() (bool, error)) error {
	p := a.startProgress(what)
	defer p.Stop()
	return poll(ctx, func() (bool, error) {
		if ok, err := gone(); ok || err != nil {
			return ok, err
		}
		for _, name := range waitsFor {
			res, err := client.Call(ctx, c.Volumes.GetVolume, &argonv1.GetVolumeRequest{Name: name})
			if err == nil && len(res.GetVolume().GetActivity()) > 0 {
				p.Set(what + ": volume " + name + ": " + strings.Join(res.GetVolume().GetActivity(), "; "))
				break
			}
		}
		return false, nil
	})
}

// isGone makes of an answer about something whether it does not exist.
func isGone(err error) (bool, error) {
	if connect.CodeOf(err) == connect.CodeNotFound {
		return true, nil
	}
	return false, err
}
