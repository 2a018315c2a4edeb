// Package replica is the rules of one copy of a volume.
//
// What lives here: making, opening and deleting this server's replicas;
// sealing one for a holder's session, and what a session may do; the server
// side of the connection. What must not: the format of the files (layer/), the
// holder's decisions (mirror/), frames (wire/).
//
// Everything but the connection is synchronous and without time, so that the
// simulation runs it as it is.
package replica
