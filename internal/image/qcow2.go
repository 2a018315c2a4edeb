package image

import "encoding/binary"

// qcow2Header is the part of the header that import decides by.
// See QEMU's docs/interop/qcow2.rst.
type qcow2Header struct {
	version     uint32
	size        uint64
	clusterBits uint32
}

// The header's incompatible features.
const (
	featureDirty       = 1 << 0
	featureCorrupt     = 1 << 1
	featureDataFile    = 1 << 2
	featureCompression = 1 << 3
	featureSubclusters = 1 << 4
)

// parseQCOW2 reads a header before QEMU gets to see the file. What would make
// QEMU open other files of this server is refused here.
func parseQCOW2(head []byte) (qcow2Header, error) {
	var h qcow2Header
	if len(head) < 72 {
		return h, refuse("the qcow2 file is truncated: it ends inside its header")
	}
	be := binary.BigEndian
	h.version = be.Uint32(head[4:])
	h.clusterBits = be.Uint32(head[20:])
	h.size = be.Uint64(head[24:])
	if h.version != 2 && h.version != 3 {
		return h, refuse("qcow2 version %d is not known", h.version)
	}
	if be.Uint64(head[8:]) != 0 || be.Uint32(head[16:]) != 0 {
		return h, refuse("the qcow2 file needs a backing file: flatten it first with `qemu-img convert -O qcow2`")
	}
	if be.Uint32(head[32:]) != 0 {
		return h, refuse("the qcow2 file is encrypted: decrypt it first")
	}
	if h.version == 3 {
		if len(head) < 104 {
			return h, refuse("the qcow2 file is truncated: it ends inside its header")
		}
		if err := checkFeatures(be.Uint64(head[72:])); err != nil {
			return h, err
		}
	}
	if h.clusterBits < 9 || h.clusterBits > 21 {
		return h, refuse("the qcow2 file is damaged: clusters of 2^%d bytes", h.clusterBits)
	}
	return h, checkSize(h.size)
}

func checkFeatures(f uint64) error {
	switch {
	case f&featureDataFile != 0:
		return refuse("the qcow2 file keeps its data in another file: flatten it first with `qemu-img convert -O qcow2`")
	case f&featureCorrupt != 0:
		return refuse("the qcow2 file is marked as corrupt: repair it first with `qemu-img check -r all`")
	case f&^(featureDirty|featureCompression|featureSubclusters) != 0:
		return refuse("the qcow2 file uses features that are not known (%#x)", f)
	}
	return nil
}
