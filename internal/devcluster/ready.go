package devcluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
	"github.com/argon-cluster/argon/client"
)

const (
	askEvery = 50 * time.Millisecond
	// answerWithin is how long a started server may take to open its socket;
	// readyWithin, a started cluster to be complete.
	answerWithin = 30 * time.Second
	readyWithin  = 60 * time.Second
)

// waitAnswer returns once the server's API answers, or the server has ended.
func (s *Server) waitAnswer(ctx context.Context) error {
	api, err := s.Client()
	if err != nil {
		return err
	}
	defer api.Close()
	s.mu.Lock()
	exited := s.exited
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	for {
		_, err := client.Call(ctx, api.Cluster.Status, &argonv1.StatusRequest{})
		if err == nil {
			return nil
		}
		select {
		case <-exited:
			return s.explain("it ended at once", errors.New(s.lastLogLine()))
		case <-ctx.Done():
			return s.explain("it does not answer", err)
		case <-time.After(askEvery):
		}
	}
}

func (s *Server) lastLogLine() string {
	data, err := os.ReadFile(s.LogPath())
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return lines[len(lines)-1]
}

// WaitReady returns once every server says that it is ready, sees all others
// alive, and the voters are as many as there should be.
func (c *Cluster) WaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	return c.each(ctx, func(ctx context.Context, s *Server) error {
		api, err := s.Client()
		if err != nil {
			return err
		}
		defer api.Close()
		for {
			status, err := client.Call(ctx, api.Cluster.Status, &argonv1.StatusRequest{})
			missing := "it does not answer"
			if err == nil {
				missing = whatIsMissing(status, len(c.servers))
			}
			if missing == "" {
				return nil
			}
			c.progress(s.Name + ": " + missing)
			select {
			case <-ctx.Done():
				return s.explain(missing, errors.Join(ctx.Err(), err))
			case <-time.After(askEvery):
			}
		}
	})
}

// whatIsMissing until a cluster of so many servers is complete; empty if
// nothing is.
func whatIsMissing(s *argonv1.StatusResponse, servers int) string {
	if s.GetState() != "ready" {
		return strings.TrimSpace("it is " + s.GetState() + " " + s.GetDetail())
	}
	alive, voters := 0, 0
	for _, v := range s.GetServers() {
		if v.GetAlive() {
			alive++
		}
		if v.GetServer().GetVoterRole() == argonv1.VoterRole_VOTER_ROLE_VOTER {
			voters++
		}
	}
	switch want := votersOf(servers); {
	case alive < servers:
		return fmt.Sprintf("it sees %d of %d servers alive", alive, servers)
	case voters < want:
		return fmt.Sprintf("%d of %d voters so far", voters, want)
	}
	return ""
}

// votersOf is how many voters a cluster of so many servers grows by itself.
func votersOf(servers int) int {
	switch {
	case servers >= 5:
		return 5
	case servers >= 3:
		return 3
	}
	return 1
}
