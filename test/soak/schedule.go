package soak

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// Fault is something that goes wrong.
type Fault string

// The faults. All but the daemon's death last for a while.
const (
	Kill     Fault = "kill"          // all processes of a server, at once
	Daemon   Fault = "kill daemon"   // only the daemon; the guard starts another
	Pause    Fault = "pause"         // a server stands still and goes on
	Cut      Fault = "cut"           // a server hears nobody, and is heard by nobody
	Part     Fault = "part"          // two servers don't hear each other
	Mute     Fault = "mute"          // one is not heard by another one
	Full     Fault = "fill disk"     // of a server
	Power    Fault = "cut power"     // of a server: what is not synced is lost
	Majority Fault = "kill majority" // three of five servers
	PowerAll Fault = "cut all power" // of all servers
)

// weights say how often a fault is chosen.
var weights = []struct {
	fault  Fault
	weight int
}{
	{Kill, 6}, {Daemon, 4}, {Pause, 4}, {Cut, 4}, {Part, 4}, {Mute, 4}, {Full, 3}, {Power, 4}, {Majority, 1}, {PowerAll, 2},
}

// Step is one fault of a schedule.
type Step struct {
	At, Lasts time.Duration
	Fault     Fault
	Servers   []int // whom it strikes; the first is silent, for Mute
}

func (s Step) String() string {
	var names []string
	for _, n := range s.Servers {
		names = append(names, fmt.Sprint("s", n+1))
	}
	return fmt.Sprintf("%s %s for %s", s.Fault, strings.Join(names, ", "), s.Lasts.Round(time.Millisecond))
}

// Times of a schedule.
const (
	firstFault = 5 * time.Second
	// quiet is how long nothing is wrong after a fault that struck most servers.
	quiet = 15 * time.Second
)

// Schedule plans faults for so many servers and so long a time; the same seed
// makes the same one. At most two of the servers are struck at any time, except
// by faults that strike most of them; nothing else is wrong during these.
func Schedule(seed uint64, servers int, during time.Duration) []Step {
	rng := rand.New(rand.NewPCG(seed, 1))
	var steps []Step
	var alone time.Duration // no other fault before
	for at := firstFault; at < during; at += time.Duration(3000+rng.IntN(7000)) * time.Millisecond {
		s := Step{At: at, Fault: draw(rng), Lasts: time.Duration(2000+rng.IntN(18000)) * time.Millisecond}
		if s.At < alone {
			continue
		}
		s.Servers = rng.Perm(servers)[:struck(s.Fault, servers)]
		if len(s.Servers) > 2 {
			s.At = max(s.At, ends(steps)+time.Second)
			alone = s.At + s.Lasts + quiet
			steps = append(steps, s)
			continue
		}
		if s.Fault == Daemon {
			s.Lasts = 0
		}
		if free(steps, s) {
			steps = append(steps, s)
		}
	}
	return steps
}

func draw(rng *rand.Rand) Fault {
	total := 0
	for _, w := range weights {
		total += w.weight
	}
	n := rng.IntN(total)
	for _, w := range weights {
		if n -= w.weight; n < 0 {
			return w.fault
		}
	}
	return Kill
}

func struck(f Fault, servers int) int {
	switch f {
	case Part, Mute:
		return 2
	case Majority:
		return servers/2 + 1
	case PowerAll:
		return servers
	}
	return 1
}

// ends is when the last of the faults is over.
func ends(steps []Step) time.Duration {
	var end time.Duration
	for _, s := range steps {
		end = max(end, s.At+s.Lasts)
	}
	return end
}

// free tells whether a fault may be added: no server is struck twice, and not
// more than two are.
func free(steps []Step, s Step) bool {
	struck := make(map[int]bool)
	for _, other := range steps {
		if other.At+other.Lasts >= s.At {
			for _, n := range other.Servers {
				struck[n] = true
			}
		}
	}
	for _, n := range s.Servers {
		if struck[n] {
			return false
		}
	}
	return len(struck)+len(s.Servers) <= 2
}
