package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
)

// This file: a server's directory gets another identity in one step. What is new is
// made in a directory of its own; one rename decides that it counts; then its parts
// take the places of the old ones, which is done again after a crash until it is
// done.

// settled is where what counts from now on is until it is in its place.
func (d directory) settled() string { return d.path("settling") }

// identityParts are what makes a server who it is.
func (d directory) identityParts() []string {
	return []string{"etcd", "ca.pem", "server.pem", "server.key", successionFile, "superseded", "server.json"}
}

func (d directory) write(name string, data []byte, mode os.FileMode) error {
	if err := renameio.WriteFile(d.path(name), data, mode); err != nil {
		return fmt.Errorf("write to the server's directory: %w", err)
	}
	return nil
}

// settle lets a staged identity count. What was there before is kept in the
// directory whose name it returns; empty: there was nothing.
func (d directory) settle(staged directory, now time.Time) (kept string, err error) {
	kept = "before-" + now.UTC().Format(copyTime)
	if err := staged.write("kept", []byte(kept), 0o600); err != nil {
		return "", err
	}
	if err := staged.sync(); err != nil {
		return "", err
	}
	if err := os.Rename(string(staged), d.settled()); err != nil {
		return "", fmt.Errorf("take the new identity: %w", err)
	}
	if err := d.sync(); err != nil {
		return "", err
	}
	if err := d.settleStaged(); err != nil {
		return "", err
	}
	if os.Remove(d.path(kept)) == nil { // it goes only if it is empty
		return "", nil
	}
	return d.path(kept), nil
}

// settleStaged puts the parts of an identity that counts in their places, if there
// is one.
func (d directory) settleStaged() error {
	from := directory(d.settled())
	name, err := os.ReadFile(from.path("kept"))
	if errors.Is(err, os.ErrNotExist) {
		return d.removeSettled()
	}
	if err != nil {
		return fmt.Errorf("read which identity counts: %w", err)
	}
	if exists(from.path("cleared")) {
		return d.placeSettled(from)
	}
	kept := directory(d.path(filepath.Base(string(name))))
	if err := os.MkdirAll(string(kept), 0o700); err != nil {
		return fmt.Errorf("keep the old identity: %w", err)
	}
	for _, part := range d.identityParts() {
		if exists(d.path(part)) && !exists(kept.path(part)) {
			if err := os.Rename(d.path(part), kept.path(part)); err != nil {
				return fmt.Errorf("keep the old identity: %w", err)
			}
		}
	}
	// Only then the new: from here on nothing in the directory is an old part.
	if err := errors.Join(kept.sync(), d.sync(), renameio.WriteFile(from.path("cleared"), nil, 0o600)); err != nil {
		return fmt.Errorf("keep the old identity: %w", err)
	}
	return d.placeSettled(from)
}

func (d directory) placeSettled(from directory) error {
	for _, part := range d.identityParts() {
		if exists(from.path(part)) {
			if err := os.Rename(from.path(part), d.path(part)); err != nil {
				return fmt.Errorf("take the new identity: %w", err)
			}
		}
	}
	if err := d.sync(); err != nil {
		return err
	}
	// First what says that there is something to do, as the rest may stay halfway.
	if err := os.Remove(from.path("kept")); err != nil {
		return fmt.Errorf("take the new identity: %w", err)
	}
	return errors.Join(from.sync(), d.removeSettled())
}

func (d directory) removeSettled() error {
	if err := os.RemoveAll(d.settled()); err != nil {
		return fmt.Errorf("take the new identity: %w", err)
	}
	return nil
}
