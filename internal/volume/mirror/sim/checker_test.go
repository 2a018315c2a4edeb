package sim

import (
	"testing"

	"github.com/anishathalye/porcupine"
	"pgregory.net/rapid"
)

// TestCheckerSees shows histories that break the promise, one for each clause
// of it, beside close ones that keep it.
func TestCheckerSees(t *testing.T) {
	type step func(c *Checker)
	var ids map[string]opID
	write := func(name string, holder int, v value) step {
		return func(c *Checker) { ids[name] = c.Write(holder, 0, 1, v, false) }
	}
	fua := func(name string, v value) step {
		return func(c *Checker) { ids[name] = c.Write(1, 0, 1, v, true) }
	}
	ok := func(name string) step { return func(c *Checker) { c.Answered(ids[name], nil) } }
	reads := func(holder int, v value) step {
		return func(c *Checker) { c.Answered(c.Read(holder, 0, 1), []value{v}) }
	}
	flush := func(c *Checker) { c.Answered(c.Flush(1), nil) }
	begin := func(c *Checker) { ids["f"] = c.Flush(1) }
	over := func(c *Checker) { c.HolderOver(1) }
	power := func(c *Checker) { c.PowerLost() }

	tests := []struct {
		name  string
		steps []step
		bad   bool
	}{
		{name: "a write is read", steps: []step{write("a", 1, 7), ok("a"), reads(1, 7)}},
		{name: "an acknowledged write is lost", steps: []step{write("a", 1, 7), ok("a"), reads(1, 0)}, bad: true},
		{name: "a value from nowhere", steps: []step{reads(1, 3)}, bad: true},
		{name: "under way: the old value, then the new", steps: []step{write("a", 1, 7), reads(1, 0), reads(1, 7)}},
		{name: "under way: the new value, then the old", steps: []step{write("a", 1, 7), reads(1, 7), reads(1, 0)}, bad: true},
		{name: "flushed while power was lost: what was lost before it", steps: []step{write("a", 1, 7), ok("a"), begin, power, ok("f"), power, reads(1, 0)}},
		{name: "flushed while power was lost: what was not", steps: []step{write("a", 1, 7), ok("a"), begin, power, reads(1, 7), ok("f"), power, reads(1, 7)}},
		{name: "flushed, then power was lost", steps: []step{write("a", 1, 7), ok("a"), begin, ok("f"), power, reads(1, 0)}, bad: true},
		{name: "unanswered: it may have happened", steps: []step{write("a", 1, 7), over, reads(2, 7)}},
		{name: "unanswered: or not", steps: []step{write("a", 1, 7), over, reads(2, 0)}},
		{name: "unanswered: not late", steps: []step{write("a", 1, 7), over, reads(2, 0), reads(2, 7)}, bad: true},
		{name: "answered late, it had happened", steps: []step{write("a", 1, 7), over, reads(2, 7), ok("a")}},
		{name: "answered late, it had not happened", steps: []step{write("a", 1, 7), over, reads(2, 0), ok("a")}, bad: true},
		{name: "power: what was not flushed may be lost", steps: []step{write("a", 1, 7), ok("a"), power, over, reads(2, 0)}},
		{name: "power: what was flushed may not", steps: []step{write("a", 1, 7), ok("a"), flush, power, over, reads(2, 0)}, bad: true},
		{name: "power: nor what was written with FUA", steps: []step{fua("a", 7), ok("a"), power, over, reads(2, 0)}, bad: true},
		{name: "power: a flush covers only what was answered before", steps: []step{write("a", 1, 7), begin, ok("a"), ok("f"), power, over, reads(2, 0)}},
		{name: "power: what was written since may be there", steps: []step{write("a", 1, 7), ok("a"), flush, write("b", 1, 8), ok("b"), power, over, reads(2, 8)}},
		{name: "power: older than the flush may not", steps: []step{write("a", 1, 7), ok("a"), write("b", 1, 8), ok("b"), flush, power, over, reads(2, 7)}, bad: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ids = map[string]opID{}
			c := NewChecker(1)
			for _, s := range tt.steps {
				s(c)
			}
			if _, err := c.Check(); (err != nil) != tt.bad {
				t.Errorf("the checker says %v, a violation is there: %v", err, tt.bad)
			}
		})
	}
}

// TestCheckerAgainstPorcupine compares the verdicts on one sector of one
// holder with those of a checker nobody here wrote.
func TestCheckerAgainstPorcupine(t *testing.T) {
	type input struct {
		write bool
		value value
	}
	model := porcupine.Model{
		Init: func() any { return value(0) },
		Step: func(state, in, out any) (bool, any) {
			if i := in.(input); i.write {
				return true, i.value
			}
			return out.(value) == state.(value), state
		},
	}
	verdicts := map[bool]int{}
	rapid.Check(t, func(t *rapid.T) {
		c := NewChecker(1)
		var events []porcupine.Event
		type open struct {
			id opID
			n  int
			in input
		}
		var pending []open
		for n := range rapid.IntRange(1, 14).Draw(t, "operations") {
			in := input{write: rapid.Bool().Draw(t, "write"), value: value(rapid.IntRange(1, 3).Draw(t, "value"))}
			o := open{n: n, in: in}
			if in.write {
				o.id = c.Write(1, 0, 1, in.value, false)
			} else {
				o.id = c.Read(1, 0, 1)
			}
			events = append(events, porcupine.Event{ClientId: n, Kind: porcupine.CallEvent, Value: in, Id: n})
			pending = append(pending, o)
			for len(pending) > 0 && (len(pending) > 3 || rapid.Bool().Draw(t, "answer")) {
				i := rapid.IntRange(0, len(pending)-1).Draw(t, "which")
				o := pending[i]
				pending = append(pending[:i], pending[i+1:]...)
				got := value(rapid.IntRange(0, 3).Draw(t, "got"))
				c.Answered(o.id, []value{got})
				events = append(events, porcupine.Event{ClientId: o.n, Kind: porcupine.ReturnEvent, Value: got, Id: o.n})
			}
		}
		for _, o := range pending {
			// porcupine wants an answer to each.
			c.Answered(o.id, []value{0})
			events = append(events, porcupine.Event{ClientId: o.n, Kind: porcupine.ReturnEvent, Value: value(0), Id: o.n})
		}
		_, err := c.Check()
		good := err == nil
		if want := porcupine.CheckEvents(model, events); want != good {
			t.Fatalf("the checker says %v, porcupine %v, of %v", good, want, events)
		}
		verdicts[good]++
	})
	if verdicts[true] == 0 || verdicts[false] == 0 {
		t.Errorf("the histories were all of one kind: %v", verdicts)
	}
}
