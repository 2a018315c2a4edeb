package image

import (
	"bytes"
	"crypto/sha512"
	"errors"
	"fmt"
	"slices"
	"testing"
)

// virtualBox is an OVF 2 description with elements of their own for disks and
// cards, as VirtualBox writes it: the disk of the second port comes first, and
// the file's name is an URI.
const virtualBox = `<?xml version="1.0"?>
<Envelope ovf:version="2.0" xmlns="http://schemas.dmtf.org/ovf/envelope/2" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/2"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:sasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_StorageAllocationSettingData.xsd"
 xmlns:epasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_EthernetPortAllocationSettingData.xsd">
  <References><File ovf:id="file1" ovf:href="my%20disk.vmdk"/><File ovf:id="file2" ovf:href="data.vmdk"/></References>
  <DiskSection><Info/>
    <Disk ovf:capacity="4194304" ovf:diskId="vmdisk1" ovf:fileRef="file1"/>
    <Disk ovf:capacity="2097152" ovf:diskId="vmdisk2" ovf:fileRef="file2"/>
  </DiskSection>
  <VirtualSystem ovf:id="old"><Info/><VirtualHardwareSection>
    <Item><rasd:InstanceID>1</rasd:InstanceID><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
    <Item><rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits><rasd:InstanceID>2</rasd:InstanceID><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>256</rasd:VirtualQuantity></Item>
    <Item><rasd:Address>0</rasd:Address><rasd:InstanceID>5</rasd:InstanceID><rasd:ResourceType>20</rasd:ResourceType></Item>
    <StorageItem><sasd:AddressOnParent>1</sasd:AddressOnParent><sasd:HostResource>/disk/vmdisk2</sasd:HostResource><sasd:InstanceID>6</sasd:InstanceID><sasd:Parent>5</sasd:Parent><sasd:ResourceType>17</sasd:ResourceType></StorageItem>
    <StorageItem><sasd:AddressOnParent>0</sasd:AddressOnParent><sasd:HostResource>/disk/vmdisk1</sasd:HostResource><sasd:InstanceID>7</sasd:InstanceID><sasd:Parent>5</sasd:Parent><sasd:ResourceType>17</sasd:ResourceType></StorageItem>
    <EthernetPortItem><epasd:Address>080027A1B2C3</epasd:Address><epasd:InstanceID>8</epasd:InstanceID><epasd:ResourceType>10</epasd:ResourceType></EthernetPortItem>
    <EthernetPortItem><epasd:InstanceID>9</epasd:InstanceID><epasd:ResourceType>10</epasd:ResourceType></EthernetPortItem>
  </VirtualHardwareSection></VirtualSystem>
</Envelope>`

// vmware has two controllers, the second of which comes first, a disk that has
// no file, ten disks' worth of addresses, and a card with its address.
const vmware = `<?xml version="1.0" encoding="UTF-8"?>
<Envelope vmw:buildId="build-1" xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf">
  <References><File ovf:href="my disk.vmdk" ovf:id="file1"/><File ovf:href="data.vmdk" ovf:id="file2"/></References>
  <DiskSection><Info/>
    <Disk ovf:capacity="3" ovf:capacityAllocationUnits="byte * 2^20" ovf:diskId="empty"/>
    <Disk ovf:capacity="4194304" ovf:diskId="boot" ovf:fileRef="file1"/>
    <Disk ovf:capacity="2097152" ovf:diskId="data" ovf:fileRef="file2"/>
  </DiskSection>
  <VirtualSystem ovf:id="old"><Info/><VirtualHardwareSection><Info/>
    <Item><rasd:Address>1</rasd:Address><rasd:InstanceID>4</rasd:InstanceID><rasd:ResourceType>6</rasd:ResourceType></Item>
    <Item><rasd:Address>0</rasd:Address><rasd:InstanceID>3</rasd:InstanceID><rasd:ResourceType>6</rasd:ResourceType></Item>
    <Item><rasd:AddressOnParent>0</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/empty</rasd:HostResource><rasd:InstanceID>9</rasd:InstanceID><rasd:Parent>4</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
    <Item><rasd:AddressOnParent>10</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/data</rasd:HostResource><rasd:InstanceID>10</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
    <Item><rasd:AddressOnParent>9</rasd:AddressOnParent><rasd:HostResource>ovf:/disk/boot</rasd:HostResource><rasd:InstanceID>11</rasd:InstanceID><rasd:Parent>3</rasd:Parent><rasd:ResourceType>17</rasd:ResourceType></Item>
    <Item><rasd:Address>00:50:56:aa:bb:cc</rasd:Address><rasd:AddressOnParent>7</rasd:AddressOnParent><rasd:InstanceID>12</rasd:InstanceID><rasd:ResourceType>10</rasd:ResourceType></Item>
  </VirtualHardwareSection></VirtualSystem>
</Envelope>`

// TestDescriptions: what those who write OVAs say of machines is what comes in.
func TestDescriptions(t *testing.T) {
	boot, data := convert(t, rawDisk(4*mib), "vmdk", "-o", "subformat=streamOptimized"), convert(t, rawDisk(2*mib), "vmdk", "-o", "subformat=streamOptimized")
	for name, c := range map[string]struct {
		description, prefix string
		disks               []int64
		hints               Hints
		macs                []string
	}{
		"VirtualBox": {virtualBox, "", []int64{4 * mib, 2 * mib}, Hints{CPUs: 2, MemoryBytes: 256 * mib, Networks: 2}, []string{"08:00:27:a1:b2:c3", ""}},
		"VMware":     {vmware, "./", []int64{4 * mib, 2 * mib, 3 * mib}, Hints{Networks: 1}, []string{"00:50:56:aa:bb:cc"}},
	} {
		t.Run(name, func(t *testing.T) {
			sums := fmt.Sprintf("SHA512(my disk.vmdk)= %x\nSHA512(./data.vmdk)= %x\n", sha512.Sum512(boot), sha512.Sum512(data))
			ova := tarOf(t, entry{c.prefix + "old.ovf", []byte(c.description)}, entry{c.prefix + "old.mf", []byte(sums)},
				entry{c.prefix + "data.vmdk", data}, entry{c.prefix + "my disk.vmdk", boot})
			g, err := newStore(t).Receive(t.Context(), Request{Data: bytes.NewReader(ova)}, ignore)
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			if !slices.Equal(g.Disks(), c.disks) || g.Hints != c.hints || !slices.Equal(g.MACs, c.macs) {
				t.Errorf("disks of %v bytes, %+v, cards %q; want %v, %+v, %q", g.Disks(), g.Hints, g.MACs, c.disks, c.hints, c.macs)
			}
		})
	}
}

// TestOnlyAnEmptyDisk: there is nothing to write of it, and nothing to make an
// image of.
func TestOnlyAnEmptyDisk(t *testing.T) {
	description := `<Envelope><DiskSection><Disk diskId="d" capacity="3" capacityAllocationUnits="byte * 2^20"/></DiskSection><VirtualSystem/></Envelope>`
	ova := tarOf(t, entry{"a.ovf", []byte(description)}, entry{"a.mf", nil})
	s := newStore(t)
	g, err := s.Receive(t.Context(), Request{Data: bytes.NewReader(ova)}, ignore)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(g.Disks(), []int64{3 * mib}) {
		t.Errorf("disks of %v bytes", g.Disks())
	}
	if err := g.Fill(t.Context(), "nbd:unix:/nonexistent", ignore); err != nil {
		t.Errorf("it was written: %v", err)
	}
	g.Close()
	if _, err := s.Import(t.Context(), "A", Request{Data: bytes.NewReader(ova)}, ignore); !errors.Is(err, ErrNotImage) {
		t.Errorf("as an image: %v", err)
	}
	onlyFiles(t, s)
}
