package image

import (
	"cmp"
	"encoding/xml"
	"fmt"
	"io"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/argon-cluster/argon/internal/hypervisor"
)

// This file reads the description in an OVA. See DMTF's DSP0243.

// described is what an OVA holds.
type described struct {
	disks []disk
	hints Hints
	// macs are the addresses of its network cards, where they are said.
	macs []string
}

// envelope is what is read of an OVF description. Names of other namespaces
// with the same end are taken, too.
type envelope struct {
	Files []struct {
		ID          string `xml:"id,attr"`
		Href        string `xml:"href,attr"`
		Compression string `xml:"compression,attr"`
		Chunk       string `xml:"chunkSize,attr"`
	} `xml:"References>File"`
	Disks   []ovfDisk `xml:"DiskSection>Disk"`
	Systems []struct {
		Hardware struct {
			// OVF 2 has elements of their own for disks and network cards.
			Items    []ovfItem `xml:"Item"`
			Storage  []ovfItem `xml:"StorageItem"`
			Ethernet []ovfItem `xml:"EthernetPortItem"`
			Config   []struct {
				Key   string `xml:"key,attr"`
				Value string `xml:"value,attr"`
			} `xml:"Config"`
		} `xml:"VirtualHardwareSection"`
	} `xml:"VirtualSystem"`
}

type ovfDisk struct {
	ID       string `xml:"diskId,attr"`
	File     string `xml:"fileRef,attr"`
	Capacity string `xml:"capacity,attr"`
	Units    string `xml:"capacityAllocationUnits,attr"`
}

type ovfItem struct {
	ID       string `xml:"InstanceID"`
	Type     int    `xml:"ResourceType"`
	Quantity string `xml:"VirtualQuantity"`
	Units    string `xml:"AllocationUnits"`
	Host     string `xml:"HostResource"`
	Address  string `xml:"Address"`
	Parent   string `xml:"Parent"`
	OnParent string `xml:"AddressOnParent"`
}

// The resource types of CIM that matter here.
const (
	ovfCPU      = 3
	ovfMemory   = 4
	ovfEthernet = 10
	ovfDrive    = 17
)

func parseOVF(text []byte, files map[string]section, f io.ReaderAt) (*described, error) {
	var e envelope
	if err := xml.Unmarshal(text, &e); err != nil {
		return nil, refuse("the OVA's description can't be read: %.120s", err)
	}
	if len(e.Systems) != 1 {
		return nil, refuse("the OVA describes %d machines: one that holds a single one can be imported", len(e.Systems))
	}
	hardware := e.Systems[0].Hardware
	items := slices.Concat(hardware.Items, hardware.Storage, hardware.Ethernet)
	var d described
	for _, item := range items {
		quantity, err := strconv.ParseInt(strings.TrimSpace(item.Quantity), 10, 64)
		switch {
		case item.Type == ovfEthernet:
			d.hints.Networks++
			d.macs = append(d.macs, ovfMAC(item.Address))
		case err != nil || quantity <= 0:
		case item.Type == ovfCPU:
			d.hints.CPUs = int(min(quantity, 1<<16))
		case item.Type == ovfMemory:
			if unit := ovfUnit(item.Units, 1<<20); quantity <= (1<<62)/unit {
				d.hints.MemoryBytes = quantity * unit
			}
		}
	}
	for _, c := range hardware.Config {
		if c.Key == "firmware" {
			d.hints.Firmware = map[string]string{"efi": "uefi", "bios": "bios"}[c.Value]
		}
	}
	var err error
	d.disks, err = ovfDisks(e, drives(items), files, f)
	return &d, err
}

// ovfMAC is a network card's address as everybody writes it; empty if none is
// said, or none that a card can have.
func ovfMAC(s string) string {
	s = strings.TrimSpace(s)
	if len(s) == 12 {
		s = s[:4] + "." + s[4:8] + "." + s[8:]
	}
	mac, err := hypervisor.ParseMAC(s)
	if err != nil {
		return ""
	}
	return mac
}

// drives are what the machine's disks are made of, as its firmware finds them:
// by the controller's address, then by that on the controller. What says no
// address stays in the order of the text.
func drives(items []ovfItem) []string {
	type place struct {
		controller, address int
		host                string
	}
	number := func(s string) int {
		n, err := strconv.Atoi(strings.TrimSpace(s))
		if err != nil {
			return 0
		}
		return n
	}
	// Controllers of one type are in the order of their addresses, the types in
	// that of the text.
	var controllers []ovfItem
	types := map[int]int{}
	for i, item := range items {
		if item.Type != ovfDrive && item.Type != ovfEthernet {
			controllers = append(controllers, item)
			if _, known := types[item.Type]; !known {
				types[item.Type] = i
			}
		}
	}
	slices.SortStableFunc(controllers, func(a, b ovfItem) int {
		return cmp.Or(cmp.Compare(types[a.Type], types[b.Type]), cmp.Compare(number(a.Address), number(b.Address)))
	})
	var places []place
	for _, item := range items {
		if item.Type == ovfDrive {
			at := slices.IndexFunc(controllers, func(c ovfItem) bool { return item.Parent != "" && c.ID == item.Parent })
			places = append(places, place{at, number(item.OnParent), item.Host})
		}
	}
	slices.SortStableFunc(places, func(a, b place) int {
		return cmp.Or(cmp.Compare(a.controller, b.controller), cmp.Compare(a.address, b.address))
	})
	var hosts []string
	for _, p := range places {
		hosts = append(hosts, p.host)
	}
	return hosts
}

// ovfDisks are first those that the machine has, in its order, then those that
// nothing refers to.
func ovfDisks(e envelope, drives []string, files map[string]section, f io.ReaderAt) ([]disk, error) {
	byID, order := map[string]ovfDisk{}, []ovfDisk{}
	for _, d := range e.Disks {
		byID[d.ID] = d
	}
	for _, host := range drives {
		// "ovf:/disk/ID", or "ovf:/file/ID" of a disk that is described no closer.
		if id := path.Base(host); path.Base(path.Dir(host)) == "file" {
			order = append(order, ovfDisk{ID: host, File: id})
		} else if d, ok := byID[id]; ok {
			order = append(order, d)
		}
	}
	var disks []disk
	seen := map[string]bool{}
	for _, d := range append(order, e.Disks...) {
		if seen[d.ID] || d.File != "" && seen["file "+d.File] {
			continue
		}
		seen[d.ID], seen["file "+d.File] = true, true
		if len(disks) == ovaDisks {
			return nil, refuse("the OVA holds more than %d disks", ovaDisks)
		}
		found, err := ovfDiskOf(e, d, files, f)
		if err != nil {
			return nil, err
		}
		disks = append(disks, found)
	}
	if len(disks) == 0 {
		return nil, refuse("the OVA holds no disk")
	}
	return disks, nil
}

// ovfDiskOf finds a disk's file. One without a file is an empty disk.
func ovfDiskOf(e envelope, d ovfDisk, files map[string]section, f io.ReaderAt) (disk, error) {
	if d.File == "" {
		n, err := strconv.ParseUint(strings.TrimSpace(d.Capacity), 10, 62)
		unit := uint64(ovfUnit(d.Units, 1))
		if err != nil || n == 0 || n > MaxSize/unit {
			return disk{}, refuse("the OVA's disk %.60q has no file, and %.60q is no size to make it of", d.ID, d.Capacity)
		}
		return disk{empty: true, virtual: wholeSectors(int64(n * unit))}, nil
	}
	for _, file := range e.Files {
		if file.ID != d.File {
			continue
		}
		s, ok := files[ovfName(file.Href, files)]
		switch {
		case !ok:
			return disk{}, refuse("the OVA does not hold %.60q, which its description names", file.Href)
		case file.Compression != "" && file.Compression != "identity", file.Chunk != "":
			return disk{}, refuse("the OVA's %.60q is compressed or split: unpack it first", file.Href)
		}
		format, err := lookAt(io.NewSectionReader(f, s.off, s.size), s.size)
		if err != nil {
			return disk{}, fmt.Errorf("the OVA's %.60q: %w", file.Href, err)
		}
		if format == OVA {
			return disk{}, refuse("the OVA's %.60q is an archive, not a disk", file.Href)
		}
		return disk{format: format, section: s}, nil
	}
	return disk{}, refuse("the OVA's description has no file %.60q, which its disk %.60q is made of", d.File, d.ID)
}

// ovfName is the name of a file that a description refers to: an URI, where
// some write the name as it is.
func ovfName(href string, files map[string]section) string {
	name := strings.TrimPrefix(href, "./")
	if _, ok := files[name]; ok {
		return name
	}
	if plain, err := url.PathUnescape(name); err == nil {
		return plain
	}
	return name
}

func lookAt(r io.ReaderAt, size int64) (Format, error) {
	head := make([]byte, min(size, peekSize))
	if err := readAt(r, head, 0); err != nil {
		return "", fmt.Errorf("reading it: %w", err)
	}
	return look(head, "")
}

// ovfUnit is a unit such as "byte * 2^20" or "MegaBytes", in bytes; usual is
// what it is where none is said, or none that is known.
func ovfUnit(s string, usual int64) int64 {
	s = strings.ToLower(strings.ReplaceAll(s, " ", ""))
	if power, ok := strings.CutPrefix(s, "byte*2^"); ok {
		if n, err := strconv.Atoi(power); err == nil && n >= 0 && n <= 40 {
			return 1 << n
		}
	}
	switch {
	case strings.HasPrefix(s, "mega"), s == "mb":
		return 1 << 20
	case strings.HasPrefix(s, "giga"), s == "gb":
		return 1 << 30
	case strings.HasPrefix(s, "kilo"), s == "kb":
		return 1 << 10
	case s == "byte", s == "bytes":
		return 1
	}
	return usual
}
