package qemu

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/argon-cluster/argon/internal/hypervisor"
	"github.com/argon-cluster/argon/internal/hypervisor/qemu/qga"
)

// This file is what guests' agents are asked. Whatever they answer is bounded,
// and harms nobody but the guest.

const (
	// agentTimeout bounds a talk with an agent.
	agentTimeout = 5 * time.Second
	// freezeTimeout bounds how long a guest may take to bring its file systems
	// to rest, and back.
	freezeTimeout = 10 * time.Second
	// shutdownTimeout is how long an agent has to refuse a shutdown; one that
	// obeys says nothing.
	shutdownTimeout = time.Second

	maxAddresses = 16
	maxWord      = 100
)

// talk has one talk with the guest's agent at a time.
func (g *guest) talk(ctx context.Context, limit time.Duration, what func(context.Context, *qga.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case g.agent <- struct{}{}:
		defer func() { <-g.agent }()
	case <-ctx.Done():
		return fmt.Errorf("guest %s: its agent is busy: %w", g.id, ctx.Err())
	}
	if err := g.listens(ctx); err != nil {
		return err
	}
	conn, err := dial(ctx, agentSocket(g.dir), g.pid)
	if err != nil {
		return fmt.Errorf("guest %s: %w", g.id, errors.Join(hypervisor.ErrNoAgent, err))
	}
	client, err := qga.New(ctx, conn)
	if err != nil {
		return fmt.Errorf("guest %s: %w", g.id, errors.Join(hypervisor.ErrNoAgent, err))
	}
	defer client.Close()
	if err := what(ctx, client); err != nil {
		return fmt.Errorf("guest %s: its agent: %w", g.id, err)
	}
	return nil
}

// listens asks QEMU whether something in the guest has the channel open: what is
// said to nobody would be heard by an agent that starts later.
func (g *guest) listens(ctx context.Context) error {
	var channels []struct {
		Label string `json:"label"`
		Open  bool   `json:"frontend-open"`
	}
	if err := g.execute(ctx, "query-chardev", &channels); err != nil {
		return err
	}
	for _, c := range channels {
		if c.Label == agentID && c.Open {
			return nil
		}
	}
	return fmt.Errorf("guest %s: %w", g.id, hypervisor.ErrNoAgent)
}

// Info implements hypervisor.Guest.
func (g *guest) Info(ctx context.Context) (hypervisor.Info, error) {
	var info hypervisor.Info
	err := g.talk(ctx, agentTimeout, func(ctx context.Context, c *qga.Client) error {
		var name struct {
			Name string `json:"host-name"`
		}
		var system struct {
			Pretty  string `json:"pretty-name"`
			Name    string `json:"name"`
			Version string `json:"version"`
		}
		var interfaces []agentInterface
		var refused error
		said := 0
		for _, q := range []struct {
			command string
			answer  any
		}{{"guest-get-host-name", &name}, {"guest-get-osinfo", &system}, {"guest-network-get-interfaces", &interfaces}} {
			err := c.Execute(ctx, q.command, nil, q.answer)
			var refusal *qga.Error
			switch {
			case errors.As(err, &refusal): // it may be told not to answer this
				refused = err
			case err != nil:
				return err
			default:
				said++
			}
		}
		if said == 0 {
			return refused // it is frozen, or says nothing at all
		}
		if system.Pretty == "" {
			system.Pretty = strings.TrimSpace(system.Name + " " + system.Version)
		}
		info = hypervisor.Info{Hostname: word(name.Name), OS: word(system.Pretty), Addresses: addresses(interfaces)}
		return nil
	})
	return info, err
}

// agentInterface is one of guest-network-get-interfaces.
type agentInterface struct {
	Addresses []struct {
		Address string `json:"ip-address"`
	} `json:"ip-addresses"`
}

// addresses are those of use from outside: no loopback, no link-local ones.
func addresses(interfaces []agentInterface) []string {
	var list []string
	for _, i := range interfaces {
		for _, a := range i.Addresses {
			ip, err := netip.ParseAddr(a.Address)
			if err != nil || ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified() || len(list) == maxAddresses {
				continue
			}
			list = append(list, ip.WithZone("").String())
		}
	}
	return list
}

// word is a guest's text as it may be shown.
func word(s string) string { return printable(s, maxWord) }

// printable is what may be shown of a text: at most so many bytes, and nothing that
// a terminal obeys.
func printable(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s[:min(len(s), 4*most)])
	return strings.TrimSpace(s[:min(len(s), most)])
}

// Freeze implements hypervisor.Guest.
func (g *guest) Freeze(ctx context.Context) error {
	return g.talk(ctx, freezeTimeout, func(ctx context.Context, c *qga.Client) error {
		return c.Execute(ctx, "guest-fsfreeze-freeze", nil, nil)
	})
}

// Thaw implements hypervisor.Guest.
func (g *guest) Thaw(ctx context.Context) error {
	return g.talk(ctx, freezeTimeout, func(ctx context.Context, c *qga.Client) error {
		return c.Execute(ctx, "guest-fsfreeze-thaw", nil, nil)
	})
}

// clockSlack is by how much a clock may be wrong that was just set.
const clockSlack = 2 * time.Second

// SetClock implements hypervisor.Guest. Agents set the hardware clock, too, and where
// the guest has no program for that they refuse, though the clock was set: then it is
// looked at. Ticks of the timer that the guest has missed are not made up for.
func (g *guest) SetClock(ctx context.Context) error {
	if err := g.execute(ctx, "rtc-reset-reinjection", nil); err != nil {
		return err
	}
	return g.talk(ctx, agentTimeout, func(ctx context.Context, c *qga.Client) error {
		refusal := new(qga.Error)
		err := c.Execute(ctx, "guest-set-time", map[string]int64{"time": time.Now().UnixNano()}, nil)
		if !errors.As(err, &refusal) {
			return err
		}
		var now int64
		if c.Execute(ctx, "guest-get-time", nil, &now) == nil && time.Since(time.Unix(0, now)).Abs() <= clockSlack {
			return nil
		}
		return err
	})
}

// PowerDown implements hypervisor.Guest.
func (g *guest) PowerDown(ctx context.Context) error {
	err := g.talk(ctx, agentTimeout, func(ctx context.Context, c *qga.Client) error {
		short, cancel := context.WithTimeout(ctx, shutdownTimeout)
		defer cancel()
		err := c.Execute(short, "guest-shutdown", map[string]string{"mode": "powerdown"}, nil)
		if short.Err() != nil && ctx.Err() == nil {
			return nil // it obeys
		}
		return err
	})
	if err == nil {
		return nil
	}
	select {
	case <-g.done:
		return nil // it was quick
	default:
	}
	return g.PressPower(ctx)
}

// PressPower implements hypervisor.Guest.
func (g *guest) PressPower(ctx context.Context) error {
	return g.execute(ctx, "system_powerdown", nil)
}
