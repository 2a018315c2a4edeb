package catalog_test

import (
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
	"github.com/argon-cluster/argon/internal/catalog/catalogtest"
)

// One record is a register: it is read, and written by compare-and-swap on the
// revision that was read.
type (
	registerInput struct {
		write bool
		// expect is the revision that the write builds on, value what it
		// writes.
		expect int64
		value  uint64
	}
	registerOutput struct {
		// refused: ErrConflict. unknown: etcd went away in the middle.
		refused, unknown bool
		revision         int64
		value            uint64
	}
	registerState struct {
		// revision is -1 after a write whose outcome nobody was told.
		revision int64
		value    uint64
	}
)

func stepRegister(st registerState, in registerInput, out registerOutput) []registerState {
	if !in.write {
		seen := registerState{revision: out.revision, value: out.value}
		if out.unknown {
			return []registerState{st}
		}
		if st.value == seen.value && (st.revision == seen.revision || st.revision == -1) {
			return []registerState{seen}
		}
		return nil
	}
	may := st.revision == in.expect
	switch {
	case out.unknown && may:
		return []registerState{st, {revision: -1, value: in.value}}
	case out.unknown || out.refused && !may:
		return []registerState{st}
	case !out.refused && may && out.revision > st.revision:
		return []registerState{{revision: out.revision, value: in.value}}
	}
	return nil
}

func registerModel(first registerState) porcupine.Model {
	model := porcupine.NondeterministicModel{
		Init: func() []any { return []any{first} },
		Step: func(state, input, output any) []any {
			var next []any
			for _, st := range stepRegister(state.(registerState), input.(registerInput), output.(registerOutput)) {
				next = append(next, st)
			}
			return next
		},
		Equal: func(a, b any) bool { return a == b },
	}
	return model.ToModel()
}

// history collects what clients did, for porcupine.
type history struct {
	began time.Time
	mu    sync.Mutex
	ops   []porcupine.Operation
}

func (h *history) record(client int, in registerInput, do func() registerOutput) registerOutput {
	call := time.Since(h.began).Nanoseconds()
	out := do()
	end := time.Since(h.began).Nanoseconds()
	if out.unknown {
		end = 1 << 62 // it may still happen at any time
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: in, Call: call, Output: out, Return: end})
	return out
}

// swapper is a client of the register.
type swapper struct {
	t       *testing.T
	history *history
	store   *catalog.Store
	id      string
	// next makes client ids: after an unknown outcome, a client is a new one,
	// since the old one's operation has not ended.
	next func() int
}

func (s *swapper) run(rounds int) {
	client := s.next()
	for round := range rounds {
		var m *argonv1.Machine
		out := s.history.record(client, registerInput{}, func() registerOutput {
			var err error
			m, err = s.store.Machines.Get(s.t.Context(), s.id)
			return s.outcome(m, err)
		})
		if !out.unknown {
			m.Placement = uint64(client)<<32 | uint64(round+1)
			in := registerInput{write: true, expect: m.GetMeta().GetRevision(), value: m.GetPlacement()}
			out = s.history.record(client, in, func() registerOutput {
				return s.outcome(m, s.store.Machines.Put(s.t.Context(), m))
			})
		}
		if out.unknown {
			client = s.next()
		}
	}
}

func (s *swapper) outcome(m *argonv1.Machine, err error) registerOutput {
	switch {
	case err == nil:
		return registerOutput{revision: m.GetMeta().GetRevision(), value: m.GetPlacement()}
	case errors.Is(err, catalog.ErrConflict):
		return registerOutput{refused: true}
	case errors.Is(err, catalog.ErrNotFound), errors.Is(err, catalog.ErrExists):
		s.t.Errorf("an error that has no place here: %v", err)
	}
	return registerOutput{unknown: true}
}

// TestCompareAndSwap: what many clients see of a record that all of them change
// is what one register could have shown, also when connections break.
func TestCompareAndSwap(t *testing.T) {
	etcd, cli := catalogtest.StartEtcd(t)
	s := create(t, cli)
	m := made(t, s, "m")
	h := &history{began: time.Now()}
	var clients int
	var mu sync.Mutex
	next := func() int {
		mu.Lock()
		defer mu.Unlock()
		clients++
		return clients
	}
	var wg sync.WaitGroup
	for _, name := range []string{"one", "two", "three", "four"} {
		store, err := catalog.Open(t.Context(), etcd.Client(name))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			sw := swapper{t: t, history: h, store: store, id: m.GetMeta().GetId(), next: next}
			sw.run(40)
		})
	}
	for range 5 {
		for _, name := range []string{"one", "two", "three", "four"} {
			etcd.Cut(name)
			etcd.Heal(name)
			if _, err := s.Machines.Get(t.Context(), m.GetMeta().GetId()); err != nil {
				t.Error(err)
			}
		}
	}
	wg.Wait()
	model := registerModel(registerState{revision: m.GetMeta().GetRevision()})
	if result := porcupine.CheckOperationsTimeout(model, h.ops, time.Minute); result != porcupine.Ok {
		t.Errorf("%d operations of %d clients: %v", len(h.ops), clients, result)
	}
}

// TestRegisterModel: the checker finds a lost update and a stale read.
func TestRegisterModel(t *testing.T) {
	write := func(call, end, expect int64, value uint64, out registerOutput) porcupine.Operation {
		return porcupine.Operation{ClientId: int(value), Input: registerInput{write: true, expect: expect, value: value}, Call: call, Return: end, Output: out}
	}
	read := func(call, end int64, out registerOutput) porcupine.Operation {
		return porcupine.Operation{Input: registerInput{}, Call: call, Return: end, Output: out}
	}
	first := write(1, 2, 1, 7, registerOutput{revision: 2, value: 7})
	for _, tc := range []struct {
		what string
		ops  []porcupine.Operation
		want bool
	}{
		{"one write, read", []porcupine.Operation{first, read(3, 4, registerOutput{revision: 2, value: 7})}, true},
		{"stale read", []porcupine.Operation{first, read(3, 4, registerOutput{revision: 1})}, false},
		{"lost update", []porcupine.Operation{first, write(1, 3, 1, 8, registerOutput{revision: 3, value: 8})}, false},
		{"refused for nothing", []porcupine.Operation{write(1, 2, 1, 7, registerOutput{refused: true})}, false},
		{"unknown that happened", []porcupine.Operation{write(1, 1<<62, 1, 7, registerOutput{unknown: true}), read(3, 4, registerOutput{revision: 5, value: 7})}, true},
		{"unknown that did not", []porcupine.Operation{write(1, 1<<62, 1, 7, registerOutput{unknown: true}), read(3, 4, registerOutput{revision: 1})}, true},
	} {
		if got := porcupine.CheckOperations(registerModel(registerState{revision: 1}), tc.ops); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.what, got, tc.want)
		}
	}
}

// TestUpdatesAddUp: no update is lost or done twice when many race.
func TestUpdatesAddUp(t *testing.T) {
	s, _ := newStore(t)
	ctx := t.Context()
	m := made(t, s, "m")
	const writers, each = 8, 20
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if _, err := s.Machines.Update(ctx, m.GetMeta().GetId(), func(m *argonv1.Machine) error {
					m.Placement++
					return nil
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got, err := s.Machines.ByName(ctx, "m"); err != nil || got.GetPlacement() != writers*each {
		t.Errorf("%d updates left %d, %v", writers*each, got.GetPlacement(), err)
	}
}
