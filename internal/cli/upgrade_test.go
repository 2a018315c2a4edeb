package cli

import (
	"slices"
	"strings"
	"testing"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

func TestUpgradeCheck(t *testing.T) {
	server := func(name string, alive bool) *argonv1.ServerView {
		return &argonv1.ServerView{Alive: alive, Server: &argonv1.Server{Meta: &argonv1.Meta{Id: name, Name: name}, Version: "v1"}}
	}
	fine := func() *argonv1.StatusResponse {
		return &argonv1.StatusResponse{State: "ready", LeaderId: "s1", Servers: []*argonv1.ServerView{server("s1", true), server("s2", true)}}
	}
	if why := mustWait(fine()); len(why) > 0 {
		t.Errorf("a cluster that is well waits for %v", why)
	}
	if got := upgradeOrder(fine()); !slices.Equal(got, []upgradeStep{{"s2", "v1", false}, {"s1", "v1", true}}) {
		t.Errorf("the order is %+v", got)
	}
	for says, change := range map[string]func(*argonv1.StatusResponse){
		"server s2 is down":            func(s *argonv1.StatusResponse) { s.Servers[1].Alive = false },
		"1 of 3 volumes":               func(s *argonv1.StatusResponse) { s.VolumesDegraded, s.VolumesTotal = 1, 3 },
		"nobody leads":                 func(s *argonv1.StatusResponse) { s.LeaderId = "" },
		"waits for a majority of them": func(s *argonv1.StatusResponse) { s.State, s.Detail = "starting", "waits for a majority of them" },
	} {
		s := fine()
		change(s)
		if why := mustWait(s); len(why) != 1 || !strings.Contains(why[0], says) {
			t.Errorf("it waits for %q, want one that says %q", why, says)
		}
	}
}
