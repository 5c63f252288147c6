"""load.py PORT SECONDS CONNECTIONS redis|plain AUTH: SET, GET and more over plain sockets; checks every answer; exit 1 on any error."""
import socket,sys,time,threading
port,secs,n=int(sys.argv[1]),float(sys.argv[2]),int(sys.argv[3]); redis=sys.argv[4]=='redis'; auth=sys.argv[5]
st={'ops':0,'errors':0,'disconnects':0,'maxms':0.0}; lk=threading.Lock(); end=time.time()+secs
def enc(*a):
    a=[x.encode() if isinstance(x,str) else x for x in a]
    return b'*%d\r\n'%len(a)+b''.join(b'$%d\r\n%s\r\n'%(len(x),x) for x in a)
def work(i):
    ops=err=dis=0; mx=0
    while time.time()<end:
        try:
            s=socket.create_connection(('127.0.0.1',port),5); f=s.makefile('rb')
            def cmd(*a):
                s.sendall(enc(*a)); l=f.readline()
                if not l.endswith(b'\r\n'): raise ConnectionError
                if l[:1]==b'$' and l[1:3]!=b'-1': d=f.read(int(l[1:])+2); return d[:-2]
                return l[:-2]
            if auth and cmd('AUTH',auth)!=b'+OK': err+=1
            j=0
            while time.time()<end:
                j+=1; k='k%d:%d'%(i,j%100); v='v%d'%j; t=time.time()
                if cmd('SET',k,v)!=b'+OK': err+=1
                if cmd('GET',k)!=v.encode(): err+=1
                if redis and cmd('PFADD','h%d'%i,v)[:1]!=b':': err+=1
                if redis and cmd('EVAL','return 7','0')!=b':7': err+=1
                each=4 if redis else 2; ops+=each; mx=max(mx,(time.time()-t)/each)
            s.close()
        except OSError: dis+=1; time.sleep(.05)
    with lk: st['ops']+=ops; st['errors']+=err; st['disconnects']+=dis; st['maxms']=max(st['maxms'],mx*1000)
T=[threading.Thread(target=work,args=(i,)) for i in range(n)]; [t.start() for t in T]; [t.join() for t in T]
print('load: ops=%(ops)d errors=%(errors)d disconnects=%(disconnects)d max_ms=%(maxms).1f'%st)
sys.exit(1 if st['errors'] or st['disconnects'] or not st['ops'] else 0)
