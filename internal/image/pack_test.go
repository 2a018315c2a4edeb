package image

import (
	"bytes"
	"encoding/xml"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// What is written into an OVA is what is read out of one, and its size is known
// before.
func TestPackedOVA(t *testing.T) {
	disk := rawDisk(4 * mib)
	path := filepath.Join(t.TempDir(), "d.vmdk")
	if err := os.WriteFile(path, convert(t, disk, "vmdk", "-o", "subformat=streamOptimized"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	p := &Packed{ova: true, files: []packedFile{{name: "web-disk1.vmdk", file: f}}}
	about := Description{Name: "web", Hints: Hints{CPUs: 3, MemoryBytes: 1536 * mib, Firmware: "uefi", Networks: 2}, MACs: []string{"52:54:00:12:34:56", ""}}
	if err := p.describe(about, []Source{{Size: 4 * mib}}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if n, err := p.WriteTo(&out); err != nil || n != p.Size() || n != int64(out.Len()) {
		t.Errorf("%d bytes were written, %d came out, %d were announced, %v", n, out.Len(), p.Size(), err)
	}
	p.Close()
	s := newStore(t)
	g, err := s.Receive(t.Context(), Request{Data: bytes.NewReader(out.Bytes())}, ignore)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if !slices.Equal(g.MACs, about.MACs) {
		t.Errorf("the cards have %q", g.MACs)
	}
	staged, err := s.Import(t.Context(), "A", Request{Data: &out}, ignore)
	if err != nil {
		t.Fatal(err)
	}
	if staged.Hints != about.Hints || staged.SHA256 != sum(disk) {
		t.Errorf("got %+v", staged)
	}
}

// A name can't break out of its place, and the text is XML.
func TestOVFText(t *testing.T) {
	text := writeOVF(Description{Name: `a"<&>`, Hints: Hints{CPUs: 1, MemoryBytes: mib, Firmware: "bios"}}, []Source{{Size: mib}, {Size: mib}}, []packedFile{{name: "a"}, {name: "b"}})
	var any struct{}
	if err := xml.Unmarshal([]byte(text), &any); err != nil {
		t.Errorf("%v:\n%s", err, text)
	}
}
