// Package image keeps disk images as raw files on this server.
//
// What lives here: finding out what a file is, checking and converting it,
// storing it durably, moving it between servers. What must not: the catalog
// (internal/rpc records images), and copying an image into a volume
// (internal/agent).
package image
