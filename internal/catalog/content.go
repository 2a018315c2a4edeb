package catalog

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	argonv1 "github.com/argon-cluster/argon/api/argon/v1"
)

// What is long in a machine's first boot is kept in a key of its own, by its
// checksum: a record is written anew with each change of its status, and etcd
// keeps all that was written for a while. Records that have the same share it.
//
// Below contentOfPrefix there is a key for each record that refers to a content.
// It is written in the transaction that makes the record refer to it, and a
// content is deleted only in a transaction that finds no such key.

// part is what a record has in a key of its own.
type part struct {
	// id is its checksum.
	id string
	// data is the content; nil where the record only refers to it.
	data []byte
	// was is what the record referred to before; empty if it did not change.
	was string
}

// Apart is a first boot as it is stored: what is long is replaced by its
// checksum. Two that are equal are so as a whole. nil for nil.
func Apart(b *argonv1.FirstBoot) (*argonv1.FirstBoot, error) {
	b = proto.CloneOf(b)
	_, err := setApart(b)
	return b, err
}

// setApart takes out of b what is long. The part's id is empty if there is none.
func setApart(b *argonv1.FirstBoot) (part, error) {
	if len(b.GetUserData()) == 0 && len(b.GetNetworkConfig()) == 0 {
		return part{id: b.GetContentId()}, nil
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(&argonv1.FirstBoot{UserData: b.GetUserData(), NetworkConfig: b.GetNetworkConfig()})
	if err != nil {
		return part{}, fmt.Errorf("catalog: encode what is for the first boot: %w", err)
	}
	sum := sha256.Sum256(data)
	p := part{id: hex.EncodeToString(sum[:]), data: data, was: b.GetContentId()}
	if p.was == p.id {
		p.was = ""
	}
	b.UserData, b.NetworkConfig, b.ContentId = nil, nil, p.id
	return p, nil
}

// Whole is a machine with all that is for its first boot.
func (s *Store) Whole(ctx context.Context, m *argonv1.Machine) (*argonv1.Machine, error) {
	id := m.GetFirstBoot().GetContentId()
	if id == "" || len(m.GetFirstBoot().GetUserData())+len(m.GetFirstBoot().GetNetworkConfig()) > 0 {
		return m, nil
	}
	what := fmt.Sprintf("what machine %q has for its first boot", m.GetMeta().GetName())
	res, err := s.etcd.Get(ctx, contentPrefix+id)
	if err != nil {
		return nil, fmt.Errorf("catalog: read %s: %w", what, err)
	}
	if len(res.Kvs) == 0 {
		return nil, fmt.Errorf("%s: %w", what, ErrNotFound)
	}
	content := &argonv1.FirstBoot{}
	if err := proto.Unmarshal(res.Kvs[0].Value, content); err != nil {
		return nil, fmt.Errorf("catalog: %s is damaged: %w", what, err)
	}
	m = proto.CloneOf(m)
	m.FirstBoot.UserData, m.FirstBoot.NetworkConfig = content.GetUserData(), content.GetNetworkConfig()
	return m, nil
}

// contentOf is the key that says that the record of a key refers to a content.
func contentOf(id, recordKey string) string {
	return contentOfPrefix + id + "/" + strings.TrimPrefix(recordKey, statePrefix)
}

// parts collects what the changes of one transaction keep apart.
type parts struct {
	ops []clientv3.Op
	// carried are contents that the transaction brings along, needed those that
	// must be there.
	carried, needed map[string]bool
	// left are contents that somebody refers to no more.
	left []string
}

func partsOf(changes []change) parts {
	p := parts{carried: map[string]bool{}, needed: map[string]bool{}}
	for _, c := range changes {
		id := c.part.id
		if id == "" {
			continue
		}
		ref := contentOf(id, c.key)
		if c.verb == deleting {
			p.ops, p.left = append(p.ops, clientv3.OpDelete(ref)), append(p.left, id)
			continue
		}
		p.ops = append(p.ops, putOnce(ref, ""))
		if c.part.data != nil && !p.carried[id] {
			p.ops, p.carried[id] = append(p.ops, putOnce(contentPrefix+id, string(c.part.data))), true
		}
		p.needed[id] = true
		if was := c.part.was; was != "" {
			p.ops, p.left = append(p.ops, clientv3.OpDelete(contentOf(was, c.key))), append(p.left, was)
		}
	}
	return p
}

// guards: what is referred to, and not brought along, must be there.
func (p parts) guards() []guard {
	var all []guard
	for id := range p.needed {
		if !p.carried[id] {
			all = append(all, guard{key: contentPrefix + id, present: true, refused: changed})
		}
	}
	return all
}

// putOnce writes a key that never changes, if it is not there.
func putOnce(key, value string) clientv3.Op {
	return clientv3.OpTxn([]clientv3.Cmp{absent(key)}, []clientv3.Op{clientv3.OpPut(key, value)}, nil)
}

// dropContent deletes a content that no record refers to.
func dropContent(ctx context.Context, e etcd, id string) error {
	unused := clientv3.Compare(clientv3.CreateRevision(contentOfPrefix+id+"/"), "=", 0).WithPrefix()
	_, err := e.Txn(ctx, []clientv3.Cmp{unused}, []clientv3.Op{clientv3.OpDelete(contentPrefix + id)}, nil)
	if err != nil {
		return fmt.Errorf("catalog: delete content %s: %w", id, err)
	}
	return nil
}

// SweepContent deletes contents that no record refers to: what is left when a
// first boot is taken away from a machine, or when who changed a record ended
// right after that. st is the catalog as it was some time ago.
func (s *Store) SweepContent(ctx context.Context, st *State) error {
	refs, err := s.etcd.Get(ctx, contentOfPrefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return fmt.Errorf("catalog: list who refers to contents: %w", err)
	}
	used := map[string]bool{}
	for _, kv := range refs.Kvs {
		id, record, _ := strings.Cut(strings.TrimPrefix(string(kv.Key), contentOfPrefix), "/")
		refers, revision := st.refers(record, id)
		if refers || kv.ModRevision > st.Revision {
			used[id] = true
			continue
		}
		// Not if the record has changed since.
		same := clientv3.Compare(clientv3.ModRevision(statePrefix+record), "=", revision)
		if _, err := s.etcd.Txn(ctx, []clientv3.Cmp{same}, []clientv3.Op{clientv3.OpDelete(string(kv.Key))}, nil); err != nil {
			return fmt.Errorf("catalog: forget that %s refers to content %s: %w", record, id, err)
		}
	}
	contents, err := s.etcd.Get(ctx, contentPrefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return fmt.Errorf("catalog: list contents: %w", err)
	}
	for _, kv := range contents.Kvs {
		if id := strings.TrimPrefix(string(kv.Key), contentPrefix); !used[id] {
			if err := dropContent(ctx, s.etcd, id); err != nil {
				return err
			}
		}
	}
	return nil
}

// refers reports whether a record, named as in contentOf, refers to a content,
// and the record's revision: 0 if there is none.
func (st *State) refers(record, id string) (refers bool, revision int64) {
	kind, recordID, _ := strings.Cut(record, "/")
	switch kind {
	case "machine":
		m := st.Machines[recordID]
		return m.GetFirstBoot().GetContentId() == id, m.GetMeta().GetRevision()
	case "checkpoint":
		c := st.Checkpoints[recordID]
		return c.GetMachine().GetFirstBoot().GetContentId() == id, c.GetMeta().GetRevision()
	}
	return true, 0 // of a kind that a newer argon has added
}
