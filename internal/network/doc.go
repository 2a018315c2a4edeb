// Package network makes machines reachable.
//
// What lives here: published TCP ports. Every server listens on its own address
// for each published port of each machine, and forwards what comes to the
// machine's server: directly to the local port that its monitor forwards to
// the guest, or through a tunnel between servers. What must not: the catalog
// (the daemon says what is published), the monitor, and which ports may be
// published (internal/rpc).
//
// The tunnel's protocol ("argon-port/1" by ALPN, over mutual TLS): the server
// that accepted the connection sends a header, the other answers with one byte,
// then both directions carry the connection's bytes. The end of one direction
// is TLS's close_notify.
package network
