// Package rpc is the API's handlers.
//
// What lives here: who may call what, the check of each request, the one
// transaction that carries it out, the wait for its effect, and the words of
// its errors. What must not: anything that starts a guest, touches a disk or
// decides where something runs; a handler changes the catalog and the agents
// and controllers act on that.
//
// Every answer is read at or after a revision that a majority of the voters
// confirmed during the call, so what one call wrote the next one sees,
// whichever server it asks.
package rpc
