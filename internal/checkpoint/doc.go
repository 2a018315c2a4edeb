// Package checkpoint is the form in which a guest's memory lies on a volume.
//
// What lives here: the format, its writer and reader, and both on a block
// device. What must not: what the memory is of, where the volume comes from
// (agent, controller), QEMU, whose stream is bytes here.
//
// All numbers are little-endian. A stream begins at the volume's first byte:
//
//	header, 64 bytes
//	   0  "ARGONMEM"
//	   8  version, 4 bytes: 1
//	  12  most bytes in a frame before compression, 4 bytes
//	  16  the checkpoint's id, filled up with zeros, 32 bytes
//	  48  zeros, 12 bytes
//	  60  CRC-32C of what is before, 4 bytes
//	frames, each 20 bytes and its content
//	   0  "FRAM"
//	   4  its number, from 0, 4 bytes
//	   8  length before compression, 4 bytes
//	  12  length of the content here, 4 bytes; equal: it is not compressed;
//	      less: it is one frame of Zstandard (RFC 8878)
//	  16  CRC-32C of the 16 bytes before and of the content, 4 bytes
//	trailer, 60 bytes
//	   0  "ENDM"
//	   4  number of frames, 4 bytes
//	   8  length of all before compression, 8 bytes
//	  16  length of all contents here, 8 bytes
//	  24  SHA-256 of the frames' heads, one after the other, 32 bytes
//	  56  CRC-32C of what is before, 4 bytes
//
// A stream without its trailer was never finished. So a reader that came to the
// end has what was written, all of it and in order, or it has an error that
// names the frame.
package checkpoint
