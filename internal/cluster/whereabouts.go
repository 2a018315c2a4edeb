package cluster

import (
	"slices"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// whereabouts is where a server is reached, as server.json keeps it for the time
// in which the catalog can't be.
type whereabouts struct {
	ServerID string `json:"server_id"`
	Name     string `json:"name"`
	Address  string `json:"address"`
	Ports    Ports  `json:"ports"`
	// Votes: it keeps the catalog.
	Votes bool `json:"votes,omitempty"`
}

// maxRemembered bounds how many servers that do not vote are remembered.
const maxRemembered = 16

// remembered are the servers that lead to the catalog: the voters, then some that
// may become voters.
func remembered(servers []*argonv1.Server) []whereabouts {
	var voters, others []whereabouts
	for _, s := range servers {
		w := whereaboutsOf(s)
		switch {
		case w.Votes:
			voters = append(voters, w)
		case len(others) < maxRemembered:
			others = append(others, w)
		}
	}
	return append(voters, others...)
}

func whereaboutsOf(s *argonv1.Server) whereabouts {
	return whereabouts{
		ServerID: s.GetMeta().GetId(), Name: s.GetMeta().GetName(), Address: s.GetAddress(),
		Ports: Ports{API: int(s.GetApiPort()), Data: int(s.GetDataPort()), Peer: int(s.GetPeerPort()), Etcd: int(s.GetEtcdPort())},
		Votes: s.GetVoterRole() == argonv1.VoterRole_VOTER_ROLE_VOTER,
	}
}

// endpointsOf are the places to look for etcd.
func endpointsOf(servers []whereabouts) []string {
	urls := make([]string, len(servers))
	for i, s := range servers {
		urls[i] = urlString(s.Address, s.Ports.Etcd)
	}
	return urls
}

// learned is what is known after a server has shown where it is; changed is false
// if that is nothing new. Who was not known before counts as one that does not
// vote: that it does is for the records to say.
func learned(known []whereabouts, news whereabouts) (all []whereabouts, changed bool) {
	i := slices.IndexFunc(known, func(w whereabouts) bool { return w.ServerID == news.ServerID })
	if i < 0 {
		news.Votes = false
		return append(slices.Clone(known), news), true
	}
	news.Votes = known[i].Votes
	if known[i] == news {
		return known, false
	}
	all = slices.Clone(known)
	all[i] = news
	return all, true
}

func (w whereabouts) proto() *argonv1.Whereabouts {
	return &argonv1.Whereabouts{
		ServerId: w.ServerID, Name: w.Name, Address: w.Address, Votes: w.Votes,
		ApiPort: uint32(w.Ports.API), DataPort: uint32(w.Ports.Data), PeerPort: uint32(w.Ports.Peer), EtcdPort: uint32(w.Ports.Etcd),
	}
}

func whereaboutsFrom(w *argonv1.Whereabouts) whereabouts {
	return whereabouts{
		ServerID: w.GetServerId(), Name: w.GetName(), Address: w.GetAddress(), Votes: w.GetVotes(),
		Ports: Ports{API: int(w.GetApiPort()), Data: int(w.GetDataPort()), Peer: int(w.GetPeerPort()), Etcd: int(w.GetEtcdPort())},
	}
}
