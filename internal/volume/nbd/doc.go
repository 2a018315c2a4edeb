// Package nbd serves a volume.Device to NBD clients, QEMU above all, on a unix
// socket.
//
// What lives here: the server side of the NBD protocol, doc/proto.md of
// https://github.com/NetworkBlockDevice/nbd: fixed newstyle handshake, simple
// and structured replies. What must not: any knowledge of how a volume is
// stored, and the protocol's client side (nbdtest/ has one for tests).
//
// A connection is two goroutines. The reader parses requests and submits them
// to the device, which completes them in any order; the writer answers what
// was completed, as much at a time as there is. The requests a connection has
// in flight are bounded in number and bytes; past that it is not read from.
//
// Whatever a client sends harms only its own connection: a request that can be
// refused is refused with its payload skipped, and a stream that makes no
// sense any more is closed.
package nbd
