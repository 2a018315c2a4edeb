package rpc

import (
	"io"
	"strings"
	"testing"
)

// pieces reads one piece at a time.
type pieces struct {
	io.Writer
	list []string
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.list) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.list[0])
	if p.list[0] = p.list[0][n:]; p.list[0] == "" {
		p.list = p.list[1:]
	}
	return n, nil
}

func (p *pieces) Close() error { return nil }

// Whoever was connected before gets what is new, and what is new only.
func TestBehind(t *testing.T) {
	for name, c := range map[string]struct {
		shown string
		list  []string
		want  string
	}{
		"first time":           {"", []string{"abc", "def"}, "abcdef"},
		"nothing new":          {"abc", []string{"abc", "def"}, "def"},
		"something new":        {"ab", []string{"xabc", "def"}, "cdef"},
		"twice the same":       {"a\n", []string{"a\na\nb", "c"}, "bc"},
		"too long ago":         {"zz", []string{"abc", "def"}, "abcdef"},
		"the guest is another": {"login:", []string{"boot"}, "boot"},
		"gone meanwhile":       {"x", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := io.ReadAll(behind(&pieces{list: c.list}, []byte(c.shown)))
			if err != nil || string(got) != c.want {
				t.Errorf("got %q, %v, want %q", got, err, c.want)
			}
		})
	}
}

func TestBehindSmallReads(t *testing.T) {
	r := behind(&pieces{list: []string{"abcdefgh"}}, []byte("ab"))
	var got strings.Builder
	for b := make([]byte, 3); ; {
		n, err := r.Read(b)
		got.Write(b[:n])
		if err != nil {
			break
		}
	}
	if got.String() != "cdefgh" {
		t.Errorf("got %q", got.String())
	}
}
