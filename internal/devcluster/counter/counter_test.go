package counter

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	want := Report{Count: 12, Found: 7, Boot: "b", Time: time.Unix(1700000000, 0)}
	got, err := Parse([]byte("count 12\nfound 7\nboot b\ntime 1700000000\n"))
	if err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []string{
		"", "count 12", "count 12\nfound 7\nboot b\n", "count x\nfound 7\nboot b\ntime 1",
		"count -1\nfound 7\nboot b\ntime 1", "<html>404</html>",
	} {
		if got, err := Parse([]byte(bad)); err == nil {
			t.Errorf("%q was read as %+v", bad, got)
		}
	}
}

func TestAsk(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("count 2\nfound 1\nboot b\ntime 3\n"))
	}))
	defer s.Close()
	if r, err := Ask(t.Context(), s.Client(), s.URL); err != nil || r.Count != 2 || r.Found != 1 {
		t.Errorf("got %+v, %v", r, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("count 12\nfound 7\nboot b\ntime 1700000000\n"))
	f.Fuzz(func(t *testing.T, body []byte) {
		if r, err := Parse(body); err == nil && r.Boot == "" {
			t.Errorf("%q was read as %+v", body, r)
		}
	})
}
