package cluster

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	"go.etcd.io/etcd/server/v3/storage/datadir"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
)

// dataLockTimeout bounds how long etcd's data is waited for; nobody else should
// have it.
const dataLockTimeout = 5 * time.Second

// readdressMembers writes into the data of an etcd that does not run where its
// members are now, by their servers' ids. etcd itself changes that only with a
// majority, which there is none of while none of them finds another
// (docs/decisions/). It counts for this member alone: which members there are,
// and what they agreed on, stays as it is.
func (d directory) readdressMembers(servers []whereabouts) error {
	urls := make(map[string]string, len(servers))
	for _, w := range servers {
		urls[w.ServerID] = urlString(w.Address, w.Ports.Peer)
	}
	path := datadir.ToBackendFileName(d.etcd())
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil // it has only its log
	}
	// As etcd opens it.
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: dataLockTimeout, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return fmt.Errorf("open etcd's data in %s: %w", d.etcd(), err)
	}
	err = changeMembers(db, urls, d.foldLog)
	if err := errors.Join(err, db.Close()); err != nil {
		return fmt.Errorf("write the voters' addresses into etcd's data in %s: %w", d.etcd(), err)
	}
	return nil
}

// changeMembers calls before, if there is something to change, and changes it.
func changeMembers(db *bbolt.DB, urls map[string]string, before func(applied) error) error {
	changed := map[string][]byte{}
	at := applied{members: &raftpb.ConfState{}}
	err := db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(schema.Members.Name())
		meta := tx.Bucket(schema.Meta.Name())
		if b == nil || meta == nil {
			return nil
		}
		at.index, at.term = number(meta.Get(schema.MetaConsistentIndexKeyName)), number(meta.Get(schema.MetaTermKeyName))
		return b.ForEach(func(key, value []byte) error {
			m := &membership.Member{}
			if err := json.Unmarshal(value, m); err != nil {
				return fmt.Errorf("member %s: %w", key, err)
			}
			if m.IsLearner {
				at.members.Learners = append(at.members.Learners, uint64(m.ID))
			} else {
				at.members.Voters = append(at.members.Voters, uint64(m.ID))
			}
			url := urls[m.Name]
			if url == "" || slices.Equal(m.PeerURLs, []string{url}) {
				return nil
			}
			m.PeerURLs = []string{url}
			value, err := json.Marshal(m)
			changed[string(key)] = value
			return err
		})
	})
	if err != nil || len(changed) == 0 {
		return err
	}
	if err := before(at); err != nil {
		return err
	}
	return db.Update(func(tx *bbolt.Tx) error {
		for key, value := range changed {
			if err := tx.Bucket(schema.Members.Name()).Put([]byte(key), value); err != nil {
				return err
			}
		}
		return nil
	})
}

// applied is what of the log is in etcd's data.
type applied struct {
	index, term uint64
	members     *raftpb.ConfState
}

func number(b []byte) uint64 {
	if len(b) != 8 {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// foldLog marks in the log up to where etcd's data has it, as etcd does by itself
// every few thousand entries. Otherwise etcd reads that part again at its start,
// and takes the addresses that it finds there for those of now.
func (d directory) foldLog(at applied) error {
	dir := filepath.Join(d.etcd(), "member", "wal")
	log, state, entries, err := openLog(dir)
	if errors.Is(err, io.ErrUnexpectedEOF) && wal.Repair(zap.NewNop(), dir) {
		log, state, entries, err = openLog(dir)
	}
	if err != nil {
		return fmt.Errorf("read etcd's log: %w", err)
	}
	known := slices.ContainsFunc(entries, func(e *raftpb.Entry) bool { return e.GetIndex() == at.index && e.GetTerm() == at.term })
	if !known {
		return log.Close() // nothing of it would be read again
	}
	// What was applied was agreed on, whether or not the log says so yet.
	state.Commit = new(max(state.GetCommit(), at.index))
	err = log.Save(state, nil)
	if err == nil {
		err = log.SaveSnapshot(&walpb.Snapshot{Index: &at.index, Term: &at.term, ConfState: at.members})
	}
	return errors.Join(err, log.Close())
}

// openLog reads etcd's log from its newest mark on.
func openLog(dir string) (*wal.WAL, *raftpb.HardState, []*raftpb.Entry, error) {
	marks, err := wal.ValidSnapshotEntries(zap.NewNop(), dir)
	if err != nil {
		return nil, nil, nil, err
	}
	from := &walpb.Snapshot{}
	if len(marks) > 0 {
		last := marks[len(marks)-1]
		from.Index, from.Term = last.Index, last.Term
	}
	log, err := wal.Open(zap.NewNop(), dir, from)
	if err != nil {
		return nil, nil, nil, err
	}
	_, state, entries, err := log.ReadAll()
	if err != nil {
		return nil, nil, nil, errors.Join(err, log.Close())
	}
	return log, state, entries, nil
}
