"""A connection to a server that speaks RESP, for probes: exit 2 when there is none."""
import socket,sys
def enc(*a):
    a=[x.encode() if isinstance(x,str) else x for x in a]
    return b"*%d\r\n"%len(a)+b"".join(b"$%d\r\n%s\r\n"%(len(x),x) for x in a)
try: s=socket.create_connection(("127.0.0.1",int(sys.argv[1])),5)
except OSError as e: print("probe: no connection",e); sys.exit(2)
f=s.makefile("rb")
def cmd(*a):
    s.sendall(enc(*a)); l=f.readline()
    if not l: print("probe: server closed"); sys.exit(2)
    if l[:1]==b"$" and l[1:3]!=b"-1": return f.read(int(l[1:])+2)[:-2]
    if l[:1]==b"*": return [rd() for _ in range(int(l[1:]))]
    return l[:-2]
def rd():
    l=f.readline()
    if l[:1]==b"$": return f.read(int(l[1:])+2)[:-2]
    return l[:-2]
