package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// Source is a disk that is to be packed.
type Source struct {
	URI  string // of its NBD export
	Size int64
}

// Description is what an OVA says of its machine.
type Description struct {
	Name string
	Hints
	// MACs are those of its network cards; of one without, it is empty.
	MACs []string
}

// Packed is a file made of disks: qcow2 of one, or an OVA of all. It needs room
// until Close.
type Packed struct {
	files []packedFile
	ova   bool
}

type packedFile struct {
	name string
	text []byte // or
	file *os.File
	size int64
}

// Pack makes a file of disks that nobody writes to meanwhile. Errors: ErrNoSpace,
// ErrNotImage for a format that is no format for this.
func (s *Store) Pack(ctx context.Context, format Format, about Description, disks []Source, progress func(Progress)) (*Packed, error) {
	var options []string
	switch {
	case format == QCOW2 && len(disks) == 1:
		options = []string{"-O", "qcow2"}
	case format == QCOW2:
		return nil, refuse("a qcow2 file has one disk, and there are %d: choose one, or export as ova", len(disks))
	case format == OVA:
		options = []string{"-O", "vmdk", "-o", "subformat=streamOptimized"}
	default:
		return nil, refuse("format %q is not one to export as: use qcow2 or ova", format)
	}
	p := &Packed{ova: format == OVA}
	for i, d := range disks {
		f, err := s.packDisk(ctx, d, options, progress)
		if err != nil {
			p.Close()
			return nil, s.explain(err)
		}
		p.files = append(p.files, packedFile{name: fmt.Sprintf("%s-disk%d.vmdk", about.Name, i+1), file: f})
	}
	if err := p.describe(about, disks); err != nil {
		p.Close()
		return nil, s.explain(err)
	}
	return p, nil
}

// packDisk converts one disk into a temporary file.
func (s *Store) packDisk(ctx context.Context, d Source, options []string, progress func(Progress)) (*os.File, error) {
	out, err := s.run(ctx, "measure", "--output=json", "-f", "raw", "-O", "qcow2", d.URI)
	if err != nil {
		return nil, explainTool("the volume can't be read", out, err)
	}
	var m struct {
		Required int64 `json:"required"`
	}
	if err := json.Unmarshal(out, &m); err != nil {
		return nil, fmt.Errorf("measuring the volume: %w", err)
	}
	if err := s.fits(m.Required); err != nil {
		return nil, err
	}
	f, err := s.temp()
	if err != nil {
		return nil, err
	}
	args := append([]string{"convert", "-p", "-f", "raw"}, options...)
	if err := s.convert(ctx, append(args, d.URI, f.Name()), d.Size, progress); err != nil {
		discard(f)
		return nil, err
	}
	return f, nil
}

// describe finds the files' sizes and, for an OVA, adds what comes before them.
func (p *Packed) describe(about Description, disks []Source) error {
	for i := range p.files {
		st, err := p.files[i].file.Stat()
		if err != nil {
			return fmt.Errorf("packing the disks: %w", err)
		}
		p.files[i].size = st.Size()
	}
	if !p.ova {
		return nil
	}
	text := []byte(writeOVF(about, disks, p.files))
	var sums strings.Builder
	fmt.Fprintf(&sums, "SHA256(%s.ovf)= %x\n", about.Name, sha256.Sum256(text))
	for _, f := range p.files {
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(f.file, 0, f.size)); err != nil {
			return fmt.Errorf("packing the disks: %w", err)
		}
		fmt.Fprintf(&sums, "SHA256(%s)= %x\n", f.name, h.Sum(nil))
	}
	p.files = append([]packedFile{
		{name: about.Name + ".ovf", text: text, size: int64(len(text))},
		{name: about.Name + ".mf", text: []byte(sums.String()), size: int64(sums.Len())},
	}, p.files...)
	return nil
}

// Size is how many bytes WriteTo writes.
func (p *Packed) Size() int64 {
	if !p.ova {
		return p.files[0].size
	}
	const block = 512
	n := int64(2 * block) // the end
	for _, f := range p.files {
		n += block + (f.size+block-1)/block*block
	}
	return n
}

// WriteTo implements io.WriterTo.
func (p *Packed) WriteTo(w io.Writer) (int64, error) {
	if !p.ova {
		return io.Copy(w, io.NewSectionReader(p.files[0].file, 0, p.files[0].size))
	}
	counted := &countingWriter{w: w}
	archive := tar.NewWriter(counted)
	for _, f := range p.files {
		h := &tar.Header{Name: f.name, Mode: 0o644, Size: f.size, Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}
		if f.size >= 8<<30 {
			h.Format = tar.FormatGNU // more than the number there holds
		}
		err := archive.WriteHeader(h)
		if err != nil {
			return counted.n, fmt.Errorf("writing the OVA: %w", err)
		}
		if f.file != nil {
			_, err = io.Copy(archive, io.NewSectionReader(f.file, 0, f.size))
		} else {
			_, err = archive.Write(f.text)
		}
		if err != nil {
			return counted.n, err
		}
	}
	return counted.n, archive.Close()
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// Close gives the room back.
func (p *Packed) Close() {
	for _, f := range p.files {
		if f.file != nil {
			discard(f.file)
		}
	}
}

// WriteDisk copies a disk of a given file into an NBD export that is at least as
// large, and holds nothing but zeros.
func (g *Given) WriteDisk(ctx context.Context, i int, uri string, progress func(Progress)) error {
	if i < 0 || i >= len(g.disks) {
		return errors.New("there is no such disk in the file")
	}
	if g.disks[i].empty {
		return nil
	}
	return g.store.convertTo(ctx, g, g.disks[i], "nbd", uri, progress)
}

// writeOVF describes a machine as VMware's and VirtualBox's tools do.
func writeOVF(about Description, disks []Source, files []packedFile) string {
	var b strings.Builder
	name := escapeXML(about.Name)
	b.WriteString(`<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf">
  <References>
`)
	for i, f := range files {
		fmt.Fprintf(&b, "    <File ovf:href=%q ovf:id=\"file%d\" ovf:size=\"%d\"/>\n", f.name, i+1, f.size)
	}
	b.WriteString("  </References>\n  <DiskSection>\n    <Info>The disks</Info>\n")
	for i, d := range disks {
		fmt.Fprintf(&b, "    <Disk ovf:capacity=\"%d\" ovf:capacityAllocationUnits=\"byte\" ovf:diskId=\"vmdisk%d\" ovf:fileRef=\"file%d\" ovf:format=\"http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized\"/>\n", d.Size, i+1, i+1)
	}
	b.WriteString("  </DiskSection>\n  <NetworkSection>\n    <Info>The networks</Info>\n    <Network ovf:name=\"network\"/>\n  </NetworkSection>\n")
	fmt.Fprintf(&b, "  <VirtualSystem ovf:id=\"%s\">\n    <Info>A machine</Info>\n    <Name>%s</Name>\n    <OperatingSystemSection ovf:id=\"101\"><Info>Linux or other</Info></OperatingSystemSection>\n    <VirtualHardwareSection>\n      <Info>What it has</Info>\n", name, name)
	fmt.Fprintf(&b, "      <System><vssd:ElementName>Virtual Hardware Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID><vssd:VirtualSystemIdentifier>%s</vssd:VirtualSystemIdentifier><vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType></System>\n", name)
	// The schema wants an item's parts in the order of the alphabet.
	item := func(id int, name, before, after string) {
		fmt.Fprintf(&b, "      <Item>%s<rasd:ElementName>%s</rasd:ElementName><rasd:InstanceID>%d</rasd:InstanceID>%s</Item>\n", before, name, id, after)
	}
	item(1, "processors", "<rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>",
		fmt.Sprintf("<rasd:ResourceType>%d</rasd:ResourceType><rasd:VirtualQuantity>%d</rasd:VirtualQuantity>", ovfCPU, about.CPUs))
	item(2, "memory", "<rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>",
		fmt.Sprintf("<rasd:ResourceType>%d</rasd:ResourceType><rasd:VirtualQuantity>%d</rasd:VirtualQuantity>", ovfMemory, about.MemoryBytes>>20))
	item(3, "controller", "<rasd:Address>0</rasd:Address>",
		"<rasd:ResourceSubType>lsilogic</rasd:ResourceSubType><rasd:ResourceType>6</rasd:ResourceType>")
	for i := range disks {
		item(10+i, fmt.Sprintf("disk%d", i+1), fmt.Sprintf("<rasd:AddressOnParent>%d</rasd:AddressOnParent>", i),
			fmt.Sprintf("<rasd:HostResource>ovf:/disk/vmdisk%d</rasd:HostResource><rasd:Parent>3</rasd:Parent><rasd:ResourceType>%d</rasd:ResourceType>", i+1, ovfDrive))
	}
	for i, mac := range about.MACs {
		address := ""
		if mac != "" {
			address = "<rasd:Address>" + mac + "</rasd:Address>"
		}
		item(40+i, fmt.Sprintf("network%d", i+1), address+"<rasd:AutomaticAllocation>true</rasd:AutomaticAllocation><rasd:Connection>network</rasd:Connection>",
			fmt.Sprintf("<rasd:ResourceSubType>E1000</rasd:ResourceSubType><rasd:ResourceType>%d</rasd:ResourceType>", ovfEthernet))
	}
	if about.Firmware == "uefi" {
		b.WriteString("      <vmw:Config ovf:required=\"false\" vmw:key=\"firmware\" vmw:value=\"efi\"/>\n")
	}
	b.WriteString("    </VirtualHardwareSection>\n  </VirtualSystem>\n</Envelope>\n")
	return b.String()
}

func escapeXML(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder never fails
	return b.String()
}
