package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// convert makes a disk of another format with QEMU's own tool.
func convert(t testing.TB, raw []byte, options ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	from, to := filepath.Join(dir, "a.raw"), filepath.Join(dir, "a")
	if err := os.WriteFile(from, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	args := append(append([]string{"convert", "-f", "raw", "-O"}, options...), from, to)
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v\n%s", args, err, out)
	}
	b, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// pack compresses with the program of that name.
func pack(t *testing.T, program string, b []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(program, append(args, "-c")...)
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", program, err)
	}
	return out
}

// fewBytes reads an odd number of bytes at once.
type fewBytes struct{ r io.Reader }

func (f fewBytes) Read(p []byte) (int, error) { return f.r.Read(p[:min(len(p), 997)]) }

type entry struct {
	name string
	data []byte
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if err := w.WriteHeader(&tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.data)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// ovf describes a machine with disks, as VMware's tools do it.
func ovf(disks ...string) []byte {
	var b strings.Builder
	b.WriteString(`<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:vmw="http://www.vmware.com/schema/ovf"><References>`)
	for i, name := range disks {
		fmt.Fprintf(&b, `<File ovf:href="%s" ovf:id="file%d"/>`, name, i)
	}
	b.WriteString(`</References><DiskSection><Info>disks</Info>`)
	for i := range disks {
		fmt.Fprintf(&b, `<Disk ovf:capacity="4194304" ovf:diskId="vmdisk%d" ovf:fileRef="file%d"/>`, i, i)
	}
	b.WriteString(`</DiskSection><VirtualSystem ovf:id="web"><VirtualHardwareSection>
<Item><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>3</rasd:VirtualQuantity></Item>
<Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>1536</rasd:VirtualQuantity></Item>`)
	for i := len(disks) - 1; i >= 0; i-- { // the last one boots
		fmt.Fprintf(&b, `<Item><rasd:HostResource>ovf:/disk/vmdisk%d</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>`, i)
	}
	b.WriteString(`<vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/></VirtualHardwareSection></VirtualSystem></Envelope>`)
	return []byte(b.String())
}

func manifest(entries ...entry) entry {
	var b strings.Builder
	for _, e := range entries {
		fmt.Fprintf(&b, "SHA256(%s)= %x\n", e.name, sha256.Sum256(e.data))
	}
	return entry{"web.mf", []byte(b.String())}
}

func TestFormats(t *testing.T) {
	disk := rawDisk(4 * mib)
	var zst bytes.Buffer
	w, err := zstd.NewWriter(&zst)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write(disk)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	stream := convert(t, disk, "vmdk", "-o", "subformat=streamOptimized")
	description, file := entry{"web.ovf", ovf("web-disk1.vmdk")}, entry{"web-disk1.vmdk", stream}
	ova := tarOf(t, description, manifest(description, file), file)
	odd := withSnapshot(t, disk)
	for name, c := range map[string]struct {
		data   []byte
		format Format
	}{
		"qcow2 that ends within a sector":          {odd, QCOW2},
		"ova of a qcow2 that ends within a sector": {tarOf(t, entry{"web.ovf", ovf("d")}, entry{"d", odd}), OVA},
		"vmdk": {convert(t, disk, "vmdk"), VMDK},
		"tar.gz of a raw disk, as clouds have it": {pack(t, "gzip", sparseTar(t, disk)), Raw},
		"tar.xz of a qcow2":                       {pack(t, "xz", tarOf(t, entry{"./disk.qcow2", odd})), QCOW2},
		"vmdk, streamOptimized":                   {stream, VMDK},
		"vdi":                                     {convert(t, disk, "vdi"), VDI},
		"vdi, static":                             {convert(t, disk, "vdi", "-o", "static=on"), VDI},
		"vhdx":                                    {convert(t, disk, "vhdx"), VHDX},
		"ova":                                     {ova, OVA},
		"raw.gz":                                  {pack(t, "gzip", disk), Raw},
		"raw.xz":                                  {pack(t, "xz", disk), Raw},
		"raw.bz2":                                 {pack(t, "bzip2", disk), Raw},
		"raw.zst":                                 {zst.Bytes(), Raw},
		"raw.gz, two streams":                     {append(pack(t, "gzip", disk[:mib]), pack(t, "gzip", disk[mib:])...), Raw},
		"raw.xz, two streams":                     {append(pack(t, "xz", disk[:mib]), pack(t, "xz", disk[mib:])...), Raw},
		"qcow2.gz":                                {pack(t, "gzip", toQCOW2(t, disk)), QCOW2},
		"vmdk.xz":                                 {pack(t, "xz", stream), VMDK},
		"ova.gz":                                  {pack(t, "gzip", ova), OVA},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			staged, err := s.Import(t.Context(), "A", Request{Data: fewBytes{bytes.NewReader(c.data)}, SHA256: sum(c.data), Size: int64(len(c.data))}, ignore)
			if err != nil {
				t.Fatal(err)
			}
			if staged.Format != c.format || staged.Size != 4*mib || staged.SHA256 != sum(disk) {
				t.Errorf("got %+v", staged)
			}
			onlyFiles(t, s, "A.raw")
			if got := mustRead(t, filepath.Join(s.dir, "A.raw")); !bytes.Equal(got, disk) {
				t.Error("the stored bytes differ")
			}
			if want := (Hints{CPUs: 3, MemoryBytes: 1536 * mib, Firmware: "uefi"}); c.format == OVA && staged.Hints != want {
				t.Errorf("the OVA's machine had %+v, want %+v", staged.Hints, want)
			}
		})
	}
}

// withSnapshot is a sound qcow2 file whose length is no multiple of a sector.
func withSnapshot(t *testing.T, disk []byte) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.qcow2")
	if err := os.WriteFile(path, toQCOW2(t, disk), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "snapshot", "-c", "s", path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b := mustRead(t, path)
	if len(b)%sector == 0 {
		t.Fatalf("the file has %d bytes, which are whole sectors", len(b))
	}
	return b
}

// TestRawThatIsSaid: what looks cut off is taken when the user says that it is
// raw, and refused with that advice when he does not.
func TestRawThatIsSaid(t *testing.T) {
	beyond := rawDisk(4 * mib)
	copy(beyond[446:], []byte{0x80, 0, 0, 0, 0x83, 0, 0, 0, 63, 0, 0, 0, 0, 64, 0, 0}) // 16,384 sectors
	beyond[510], beyond[511] = 0x55, 0xaa
	for name, data := range map[string][]byte{
		"a partition that ends beyond the disk": beyond,
		"an end within a sector":                rawDisk(4 * mib)[:4*mib-100],
	} {
		s := newStore(t)
		_, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(data)}, ignore)
		if !errors.Is(err, ErrNotImage) || !strings.Contains(err.Error(), "say that the format is raw") {
			t.Errorf("%s: %v", name, err)
		}
		staged, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(data), Format: Raw}, ignore)
		if err != nil || staged.Size != 4*mib {
			t.Errorf("%s, said to be raw: %+v, %v", name, staged, err)
		} else if got := mustRead(t, filepath.Join(s.dir, "A.raw")); !bytes.Equal(got[:len(data)], data) {
			t.Errorf("%s: the stored bytes differ", name)
		}
	}
}

// sparseTar is disk.raw in an archive of GNU's old kind, with its holes.
func sparseTar(t *testing.T, disk []byte) []byte {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	w := &sparseWriter{f: f}
	if _, err := w.Write(disk); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.finish(), f.Close()); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("tar", "--format=oldgnu", "-Scf", "-", "-C", dir, "disk.raw").Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestDisksOfOVA: in the order that the machine has them, not that of the
// archive.
func TestDisksOfOVA(t *testing.T) {
	small, large := convert(t, rawDisk(2*mib), "vmdk", "-o", "subformat=streamOptimized"), convert(t, rawDisk(4*mib), "qcow2")
	ova := tarOf(t, entry{"web.ovf", ovf("a", "b")}, entry{"a", small}, entry{"b", large})
	s := newStore(t)
	g, err := s.Receive(t.Context(), Request{Data: bytes.NewReader(ova)}, ignore)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(g.Disks()) != fmt.Sprint([]int{4 * mib, 2 * mib}) {
		t.Errorf("got %v", g.Disks())
	}
	g.Close()
	onlyFiles(t, s)
	_, err = s.Import(t.Context(), "A", Request{Data: bytes.NewReader(ova)}, ignore)
	if !errors.Is(err, ErrNotImage) || !strings.Contains(err.Error(), "holds 2 disks") {
		t.Errorf("as an image: %v", err)
	}
	onlyFiles(t, s)
}

// lie changes a number in an image's header.
func lie32(b []byte, at int, n uint32) []byte {
	return patch(b, at, binary.LittleEndian.AppendUint32(nil, n)...)
}

func lie64(b []byte, at int, n uint64) []byte {
	return patch(b, at, binary.LittleEndian.AppendUint64(nil, n)...)
}

func replaced(t *testing.T, b []byte, old, with string) []byte {
	t.Helper()
	if !bytes.Contains(b, []byte(old)) {
		t.Fatalf("there is no %q", old)
	}
	return bytes.Replace(b, []byte(old), append([]byte(with), make([]byte, max(0, len(old)-len(with)))...)[:max(len(old), len(with))], 1)
}

// manyGrains is a vmdk file whose directory names its first table wherever it can,
// or whose tables name one grain.
func manyGrains(t *testing.T, vmdk []byte, grains bool) []byte {
	t.Helper()
	h, err := parseVMDK(vmdk)
	if err != nil {
		t.Fatal(err)
	}
	b := bytes.Clone(vmdk)
	le := binary.LittleEndian
	first := le.Uint32(b[h.directory*vmdkSector:])
	entries := int(h.entries)
	for i := 0; grains && i < entries; i++ {
		le.PutUint32(b[int(first)*vmdkSector+4*i:], first)
	}
	// The directory goes to the end, and is as large as the rest of the file.
	at := (len(b) + vmdkSector - 1) / vmdkSector
	tables := at * vmdkSector / 4
	b = append(b, make([]byte, at*vmdkSector-len(b)+4*tables)...)
	for i := range tables {
		le.PutUint32(b[at*vmdkSector+4*i:], first)
	}
	return lie64(lie64(b, 56, uint64(at)), 12, uint64(tables*entries)*h.grain)
}

// What qemu-img says of a file that is wrong throughout is not kept in memory.
func TestToolThatSaysMuch(t *testing.T) {
	tool := filepath.Join(t.TempDir(), "tool")
	if err := os.WriteFile(tool, []byte("#!/bin/sh\nyes 'qemu-img: wrong' | head -c 20000000 >&2\nexit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := newStore(t, func(o *Options) { o.Tool = tool })
	out, err := s.run(t.Context(), "check")
	if err == nil || len(out) != mostSaid {
		t.Errorf("%d bytes are kept: %v", len(out), err)
	}
	if err := explainTool("no", out, err); err.Error() != "no: wrong" {
		t.Errorf("got %q", err)
	}
}

func TestFormatsThatLie(t *testing.T) {
	disk := rawDisk(4 * mib)
	vmdk, stream := convert(t, disk, "vmdk"), convert(t, disk, "vmdk", "-o", "subformat=streamOptimized")
	vdi, vhdx := convert(t, disk, "vdi"), convert(t, disk, "vhdx")
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("secret"), 100_000), 0o600); err != nil {
		t.Fatal(err)
	}
	// What QEMU would follow: a description with files of this server's.
	elsewhere := "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 1024 FLAT \"" + secret + "\" 0\n"
	inside := bytes.Clone(vmdk)
	copy(inside[512:], append([]byte(elsewhere), make([]byte, 512)...))
	good := entry{"d.vmdk", stream}
	bomb := pack(t, "gzip", make([]byte, 64*mib))
	for name, c := range map[string]struct {
		data []byte
		says string
	}{
		"vmdk, only a mark":                  {vmdk[:20], "truncated"},
		"vmdk, only a header":                {vmdk[:512], "names no data"},
		"vmdk, cut in the tables":            {vmdk[:66_000], "truncated"},
		"vmdk, cut in the last grain":        {vmdk[:len(vmdk)-5000], "truncated"},
		"vmdk, nothing inside":               {lie64(vmdk, 12, 0), "other files"},
		"vmdk, 2^63":                         {lie64(vmdk, 12, 1<<63), "at most"},
		"vmdk, -1":                           {lie64(vmdk, 12, 1<<64-1), "at most"},
		"vmdk, larger than the disk":         {lie64(vmdk, 12, 1<<36), "truncated"},
		"vmdk, larger than it is":            {lie64(vmdk, 12, 1<<20), ""},
		"vmdk, grains of nothing":            {lie64(vmdk, 20, 0), "damaged"},
		"vmdk, tables of 2^31":               {lie32(vmdk, 44, 1<<31), "damaged"},
		"vmdk, tables elsewhere":             {lie64(vmdk, 56, 1<<40), "truncated"},
		"vmdk, tables far elsewhere":         {lie64(vmdk, 56, 1<<63), "truncated"},
		"vmdk, the same table over and over": {manyGrains(t, vmdk, false), "more than it has room for"},
		"vmdk, the same grain over and over": {manyGrains(t, vmdk, true), "more than it has room for"},
		"vmdk, description elsewhere":        {lie64(vmdk, 28, 1<<40), "one part of several"},
		"vmdk, no description":               {lie64(vmdk, 28, 0), "one part of several"},
		"vmdk, names other files":            {inside, "monolithicFlat"},
		"vmdk, names other files and none":   {lie64(inside, 12, 0), "other files"},
		"vmdk, flat extent":                  {replaced(t, vmdk, "8192 SPARSE", "8192 FLAT"), "other files"},
		"vmdk, has a parent":                 {replaced(t, vmdk, "parentCID=ffffffff", "parentCID=12345678"), "backing file"},
		"vmdk, has a parent's name":          {replaced(t, vmdk, "# Extent description", `parentFileNameHint="x"`), "backing file"},
		"vmdk, of another kind":              {replaced(t, vmdk, "monolithicSparse", "vmfsSparse"), "vmfsSparse"},
		"vmdk description":                   {[]byte(elsewhere), "in other files"},
		"vmdk, stream, cut":                  {stream[:len(stream)-40_000], "truncated"},
		"vmdk, stream, footer that is none":  {lie64(stream, 56, vmdkAtEnd), "truncated"},
		"vdi, only a header":                 {vdi[:512], "truncated"},
		"vdi, half a header":                 {vdi[:200], "truncated"},
		"vdi, cut":                           {vdi[:len(vdi)-5000], "truncated"},
		"vdi, a difference":                  {lie32(vdi, 0x4c, 4), "difference"},
		"vdi, has a parent":                  {patch(vdi, 0x1b8, 1, 2, 3, 4), "vdi file is damaged"},
		"vdi, 2^63":                          {lie64(vdi, 0x170, 1<<63), "at most"},
		"vdi, larger than the disk":          {lie64(vdi, 0x170, 1<<45), "no space"},
		"vdi, more blocks":                   {lie32(vdi, 0x184, 1<<31), "damaged"},
		"vdi, some more blocks":              {lie32(vdi, 0x184, 100), "truncated"},
		"vdi, blocks of nothing":             {lie32(vdi, 0x178, 0), "damaged"},
		"vdi, of nothing":                    {lie64(vdi, 0x170, 0), "empty"},
		"vhdx, only a mark":                  {vhdx[:64<<10], "damaged or truncated"},
		"vhdx, cut":                          {vhdx[:11*mib], "damaged or truncated"},
		"vhdx, no headers":                   {patch(vhdx, 64<<10, make([]byte, 128<<10)...), "damaged or truncated"},
		"ova, no disk":                       {tarOf(t, entry{"a.ovf", ovf()}), "no disk"},
		"ova, disk not there":                {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}), "does not hold"},
		"ova, disk of another directory":     {tarOf(t, entry{"a.ovf", ovf("../../d.vmdk")}, entry{"../../d.vmdk", stream}), "has no path"},
		"ova, absolute path":                 {tarOf(t, entry{"a.ovf", ovf(secret)}, entry{secret, stream}), "has no path"},
		"ova, disk named by a path":          {tarOf(t, entry{"a.ovf", ovf(secret)}, good), "does not hold"},
		"ova, twice the same":                {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, good, good), "twice"},
		"ova, two descriptions":              {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, entry{"b.ovf", ovf("d.vmdk")}, good), "several"},
		"ova, description is no XML":         {tarOf(t, entry{"a.ovf", []byte("hello")}, good), "can't be read"},
		"ova, long description":              {tarOf(t, entry{"a.ovf", make([]byte, 5*mib)}, good), "no description"},
		"ova, cut":                           {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, good)[:100_000], "truncated"},
		"ova, wrong manifest":                {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, manifest(entry{"d.vmdk", disk}), good), "manifest"},
		"ova, manifest that repeats itself":  {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, manifest(good, good), good), "twice"},
		"ova, manifest of more":              {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, manifest(entry{"e.vmdk", disk}), good), "not whole"},
		"ova, manifest of an unknown kind":   {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, entry{"a.mf", []byte("MD5(d.vmdk)= 00")}, good), "of kind \"MD5\""},
		"ova, manifest that is none":         {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, entry{"a.mf", []byte("hello")}, good), "manifest can't be read"},
		"ova, wrong SHA-512":                 {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, entry{"a.mf", fmt.Appendf(nil, "SHA512(d.vmdk)= %x", sha512.Sum512(disk))}, good), "manifest"},
		"tar of nothing that is known":       {tarOf(t, entry{"disk.raw", make([]byte, mib)}), "neither qcow2"},
		"tar of a tar":                       {tarOf(t, entry{"disk.raw", tarOf(t, good)}), "holds an archive"},
		"tar, cut":                           {tarOf(t, entry{"disk.raw", disk})[:mib], "truncated"},
		"tar of two disks":                   {tarOf(t, entry{"a.raw", disk}, entry{"b.raw", disk}), "no .ovf"},
		"ova in an ova":                      {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, entry{"d.vmdk", tarOf(t, good)}), "archive"},
		"ova, disk with other files":         {tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, entry{"d.vmdk", []byte(elsewhere)}), "in other files"},
		"ova, link":                          {link(t, secret), "not an ordinary file"},
		"gzip, cut":                          {pack(t, "gzip", disk)[:1000], "gzip, and damaged or truncated"},
		"xz, cut":                            {pack(t, "xz", disk)[:1000], "xz, and damaged or truncated"},
		"bzip2, cut":                         {pack(t, "bzip2", disk)[:1000], "bzip2, and damaged or truncated"},
		"gzip in gzip":                       {pack(t, "gzip", pack(t, "gzip", disk)), "compressed with gzip, not a disk"},
		"gzip and more":                      {append(pack(t, "gzip", disk), "more"...), "gzip"},
		"gzip of nothing":                    {pack(t, "gzip", nil), "empty"},
		"gzip bomb":                          {bomb, "no space"},
		"xz that wants memory":               {hungryXZ(t, disk, 0), "window of 4095 MiB"},
		"xz that wants memory later":         {hungryXZ(t, disk, 2), "window of 4095 MiB"},
		"zstd that wants memory":             {[]byte("\x28\xb5\x2f\xfd\x00\xff00000000"), "zstd"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, func(o *Options) {
				o.Free = func(string) (uint64, uint64, error) { return 32 * mib, 48 * mib, nil }
			})
			_, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(c.data), Format: formatOf(c.data)}, ignore)
			if err == nil || !errors.Is(err, ErrNotImage) && !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want ErrNotImage or ErrNoSpace with %q", err, c.says)
			}
			if err != nil && (strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), ".part-")) {
				t.Errorf("not an error for a user: %q", err)
			}
			onlyFiles(t, s)
		})
	}
}

// formatOf lets a bomb of zeros through to where it bursts.
func formatOf(b []byte) Format {
	if len(b) > 60_000 && len(b) < 70_000 && b[0] == 0x1f {
		return Raw
	}
	return ""
}

// link is an OVA whose disk is a link out of it.
func link(t *testing.T, to string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "d.vmdk", Linkname: to, Typeflag: tar.TypeSymlink}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// hungryXZ lets one of the blocks of a file ask for the largest window there is.
func hungryXZ(t *testing.T, b []byte, block int) []byte {
	t.Helper()
	out := pack(t, "xz", b, "--block-size=1MiB")
	at := 0
	for range block + 1 {
		i := bytes.Index(out[at:], []byte{0x21, 1, 0x16}) // LZMA2 with 8 MiB
		if i < 0 {
			t.Fatalf("there is no block %d", block)
		}
		at += i + 3
	}
	return patch(out, at-1, 40)
}

// The watch sees all blocks, whatever way the compressor has chosen.
func TestXZWatch(t *testing.T) {
	disk := rawDisk(4 * mib)
	for _, args := range [][]string{
		{"-0"},
		{"--block-size=1MiB"},
		{"--block-size=1000001", "--check=none"},
		{"--check=crc32", "-T2", "--block-size=700KiB"},
		{"--check=sha256", "--block-list=1,70000,3,0"},
		{"--lzma2=preset=6,dict=64KiB,lc=0,lp=2"},
	} {
		packed := pack(t, "xz", disk, args...)
		for name, data := range map[string][]byte{"one": packed, "two": append(bytes.Clone(packed), packed...), "padded": append(append(bytes.Clone(packed), make([]byte, 8)...), packed...)} {
			w := newXZWatch(fewBytes{bytes.NewReader(data)})
			out, err := io.ReadAll(w)
			if err != nil || !bytes.Equal(out, data) {
				t.Errorf("%v, %s: %v", args, name, err)
			}
			if fmt.Sprintf("%p", w.then) != fmt.Sprintf("%p", w.afterStream) || w.skip > 0 {
				t.Errorf("%v, %s: it does not know where the end is", args, name)
			}
		}
	}
}

// TestDamagedFormats imports files with random damage: whatever comes out,
// nothing may be left behind after an error, and nobody may panic.
func TestDamagedFormats(t *testing.T) {
	disk := rawDisk(2 * mib)
	stream := convert(t, disk, "vmdk", "-o", "subformat=streamOptimized")
	for name, good := range map[string][]byte{
		"vmdk": convert(t, disk, "vmdk"), "stream": stream, "vdi": convert(t, disk, "vdi"), "vhdx": convert(t, disk, "vhdx"),
		"ova": tarOf(t, entry{"a.ovf", ovf("d.vmdk")}, entry{"d.vmdk", stream}),
	} {
		for seed := range uint64(6) {
			r := rand.New(rand.NewPCG(seed, 2))
			bad := bytes.Clone(good)
			for range 1 + r.IntN(20) {
				bad[r.IntN(min(len(bad), 300_000))] = byte(r.Uint32())
			}
			s := newStore(t)
			if _, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(bad)}, ignore); err != nil {
				t.Logf("%s %d: %v", name, seed, err)
				onlyFiles(t, s)
			} else {
				onlyFiles(t, s, "A.raw")
			}
		}
	}
}

// TestDownloadOverHTTP: only with a checksum.
func TestDownloadOverHTTP(t *testing.T) {
	packed := pack(t, "gzip", rawDisk(2*mib))
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(packed) }))
	defer plain.Close()
	s := newStore(t, func(o *Options) { o.HTTP = plain.Client() })
	defer plain.Client().CloseIdleConnections()
	_, err := s.Import(t.Context(), "A", Request{URL: plain.URL + "/a.gz"}, ignore)
	if !errors.Is(err, ErrNotImage) || !strings.Contains(err.Error(), "--sha256") {
		t.Errorf("without a checksum: %v", err)
	}
	if _, err = s.Import(t.Context(), "A", Request{URL: plain.URL + "/a.gz", SHA256: sum(nil)}, ignore); !errors.Is(err, ErrChecksum) {
		t.Errorf("with a wrong one: %v", err)
	}
	onlyFiles(t, s)
	if _, err = s.Import(t.Context(), "A", Request{URL: plain.URL + "/a.gz", SHA256: sum(packed)}, ignore); err != nil {
		t.Errorf("with the right one: %v", err)
	}
}

func FuzzFormats(f *testing.F) {
	var small bytes.Buffer
	z := gzip.NewWriter(&small)
	_, _ = z.Write([]byte("hello"))
	_ = z.Close()
	f.Add(small.Bytes())
	f.Add(append([]byte("KDMV\x01\x00\x00\x00"), make([]byte, 2000)...))
	f.Add(append(make([]byte, 0x40), "\x7f\x10\xda\xbe"...))
	f.Add(tarOf(f, entry{"a.ovf", ovf("d.vmdk")}, entry{"d.vmdk", []byte("KDMV")}))
	f.Add(ovf("d.vmdk"))
	f.Add([]byte("\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4\x46\x02\x00\x21\x01\x16\x00\x00\x00????\x01\x00\x00?\x00\x00\x00\x00????????\x00\x01\x05\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, size := bytes.NewReader(b), int64(len(b))
		if n, err := checkVMDK(r, size); err == nil && (n == 0 || n > MaxSize) {
			t.Errorf("vmdk: size %d let through", n)
		}
		if n, err := checkVDI(r, size); err == nil && (n == 0 || n > MaxSize) {
			t.Errorf("vdi: size %d let through", n)
		}
		if held, err := readOVA(t.Context(), r, size); err == nil {
			for _, d := range held.disks {
				if d.off < 0 || d.size < 0 || d.off+d.size > size || d.virtual < 0 || d.virtual > MaxSize {
					t.Errorf("ova: %+v of %d bytes let through", d, size)
				}
			}
		}
		_, _ = holdsOneFile(r, size)
		_, _ = parseOVF(b, map[string]section{"d.vmdk": {0, size}}, r)
		_, _ = io.Copy(io.Discard, newXZWatch(fewBytes{r}))
		_ = readDescription(string(b))
	})
}
