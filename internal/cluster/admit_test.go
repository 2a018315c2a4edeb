package cluster

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/internal/catalog"
)

// Servers that are admitted at the same time do not get the same address, nor
// one token twice.
func TestAdmissionsMeet(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	ask := func(token, name, address string) error {
		_, request, err := newRequest()
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.member.Admit(t.Context(), &argonv1.AdmitRequest{Token: token, CertificateRequest: request, Server: &argonv1.Server{
			Meta: &argonv1.Meta{Name: name}, Address: address, ApiPort: 7440, DataPort: 7441, PeerPort: 7442, EtcdPort: 7443,
		}})
		return err
	}
	token := a.token(time.Hour)
	for _, tt := range []struct {
		name      string
		tokens    [2]string
		addresses [2]string
		want      error
	}{
		{"at one address", [2]string{a.token(time.Hour), a.token(time.Hour)}, [2]string{w.prefix + "201", w.prefix + "201"}, catalog.ErrExists},
		{"by one token", [2]string{token, token}, [2]string{w.prefix + "202", w.prefix + "203"}, ErrToken},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var errs [2]error
			var wg sync.WaitGroup
			for i := range errs {
				wg.Go(func() {
					errs[i] = ask(tt.tokens[i], fmt.Sprint("x", i, tt.addresses[i][len(tt.addresses[i])-1:]), tt.addresses[i])
				})
			}
			wg.Wait()
			if (errs[0] == nil) == (errs[1] == nil) || !errors.Is(errors.Join(errs[:]...), tt.want) {
				t.Errorf("got %v and %v", errs[0], errs[1])
			}
		})
	}
	for _, address := range []string{"", "0.0.0.0", "::", "224.0.0.1", "a b", "a/b", "-a", "s1:7440", "fe80::1%eth0"} {
		if err := ask(a.token(time.Hour), "y", address); err == nil || !strings.Contains(err.Error(), "--address") {
			t.Errorf("address %q: %v", address, err)
		}
	}
	for _, address := range []string{w.prefix + "204", "fd00::1", "s5", "s5.example.org"} {
		if !reachable(address) {
			t.Errorf("address %q is refused", address)
		}
	}
}

// A token for several servers lets just as many in, also when more ask at once.
func TestTokenForSeveral(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	token, rec, err := a.member.CreateToken(t.Context(), 3, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	var errs [5]error
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			_, request, err := newRequest()
			if err != nil {
				errs[i] = err
				return
			}
			_, errs[i] = a.member.Admit(t.Context(), &argonv1.AdmitRequest{Token: token, CertificateRequest: request, Server: &argonv1.Server{
				Meta: &argonv1.Meta{Name: fmt.Sprint("n", i)}, Address: fmt.Sprint(w.prefix, 210+i), ApiPort: 7440, DataPort: 7441, PeerPort: 7442, EtcdPort: 7443,
			}})
		})
	}
	wg.Wait()
	in := 0
	for _, err := range errs {
		switch {
		case err == nil:
			in++
		case !errors.Is(err, ErrToken):
			t.Error(err)
		}
	}
	if in != 3 {
		t.Errorf("%d servers were let in: %v", in, errs)
	}
	list, err := a.member.ListTokens(t.Context())
	if err != nil || len(list) != 1 || list[0].GetId() != rec.GetId() || len(list[0].GetAdmitted()) != 3 || list[0].GetUsedBy() == "" {
		t.Errorf("listed: %v, %v", list, err)
	}
	if err := a.member.CheckToken(t.Context(), token); !errors.Is(err, ErrToken) {
		t.Errorf("a token that was used up: %v", err)
	}
}

// Tokens are listed for a while after their time, and then forgotten.
func TestOldTokens(t *testing.T) {
	w := newWorld(t)
	a := w.first()
	listed := func() int {
		list, err := a.member.ListTokens(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	a.token(time.Hour)
	a.wrong.Store(int64(tokenKept))
	a.token(time.Hour)
	if n := listed(); n != 2 {
		t.Errorf("%d tokens in the week after the first one's time", n)
	}
	a.wrong.Store(int64(tokenKept + 2*time.Hour))
	a.token(time.Hour)
	if n := listed(); n != 2 {
		t.Errorf("%d tokens a week after the first one's time", n)
	}
}

func TestTokenRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tok := newToken([32]byte(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "fingerprint")))
		got, err := parseToken("  " + tok.String() + "\n")
		if err != nil || got.String() != tok.String() {
			t.Fatalf("%s came back as %s, %v", tok, got, err)
		}
	})
}

func FuzzParseToken(f *testing.F) {
	f.Add(newToken([32]byte{1}).String())
	f.Add("argon1...")
	f.Add("argon1.0000A00000.00000000000000000000000000000000.0000000000000000000000000000000000000000000")
	f.Add("argon1.0000000000.0000000000000000\n0000000000000000.0000000000000000000000000000000000000000000")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := parseToken(text)
		if err == nil && tok.String() != strings.TrimSpace(text) {
			t.Errorf("%q was read as %s", text, tok)
		}
	})
}
