package cli

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

func TestTokenState(t *testing.T) {
	now := time.Now()
	a := &app{err: new(strings.Builder), now: func() time.Time { return now }}
	servers := map[string]string{"1": "s1", "2": "s2"}
	later, before := timestamppb.New(now.Add(time.Hour)), timestamppb.New(now.Add(-time.Hour))
	for _, tt := range []struct {
		token *argonv1.Token
		want  string
	}{
		{&argonv1.Token{Expires: later}, "fresh"},
		{&argonv1.Token{Expires: later, Servers: 2}, "fresh, for 2 servers"},
		{&argonv1.Token{Expires: later, Servers: 2, Admitted: []string{"1"}}, "1 of 2 left, used by s1"},
		{&argonv1.Token{Expires: before, Servers: 2, Admitted: []string{"1"}}, "expired"},
		{&argonv1.Token{Expires: later, Servers: 2, Admitted: []string{"1", "3"}, UsedBy: "3"}, "used by s1, 3"},
		{&argonv1.Token{Expires: later, UsedBy: "2"}, "used by s2"},
	} {
		if got := a.tokenState(tt.token, servers).text; got != tt.want {
			t.Errorf("%v: %q, want %q", tt.token, got, tt.want)
		}
	}
}
