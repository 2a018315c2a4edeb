package cluster

import (
	"os"
	"testing"
)

// A server whose disk is full must start: who it is is written only if it changes,
// and then as a file of its own, which takes the place of the old one.
func TestIdentityIsWrittenWhenItChanges(t *testing.T) {
	d := directory(t.TempDir())
	id := &identity{Schema: identitySchema, ServerID: "A"}
	file := func() os.FileInfo {
		t.Helper()
		if err := d.saveIdentity(id); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(d.identityFile())
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	first := file()
	if !os.SameFile(first, file()) {
		t.Error("it was written though nothing has changed")
	}
	id.Address = "10.0.0.1"
	if os.SameFile(first, file()) {
		t.Error("it was changed in its place, or not at all")
	}
	if entries, err := os.ReadDir(string(d)); err != nil || len(entries) != 1 {
		t.Errorf("%v are there, %v", entries, err)
	}
}
