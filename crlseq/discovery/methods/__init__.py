"""One file per discovery method; `crlseq.discovery.methods.protocol` says how to add one."""
