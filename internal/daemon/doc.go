// Package daemon is the composition root: it builds a server's parts, starts
// and stops them in order, and translates between the interfaces that they
// were written against.
//
// What lives here: the order of things, listening, the dispatch of the data
// port, adapters. What must not: rules. If something here decides more than
// which part talks to which, it belongs into a part.
//
// A server that is not part of a cluster serves only Init, Join and Status, on
// its unix socket; once it is, the rest starts in the same process.
package daemon
