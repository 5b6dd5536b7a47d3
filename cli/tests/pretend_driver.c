/* a pretend CUDA driver: answers what a host asks, counts launches and runs nothing.
   Streams and memory at 0xbad0000000000000 and above are of another context. Memory at 0xdad0000000000000 and
   above is of the host. */
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
static int env(const char*n,int d){const char*v=getenv(n);return v?atoi(v):d;}
int cuInit(unsigned f){return env("FAKE_INIT",0);}
int cuDriverGetVersion(int*v){*v=env("FAKE_DRIVER",12080);return 0;}
int cuDeviceGetCount(int*n){*n=env("FAKE_COUNT",1);return 0;}
int cuDeviceGet(int*d,int o){ if(o>=env("FAKE_COUNT",1)) return 101; *d=o; return 0;}
int cuDevicePrimaryCtxRetain(void**c,int d){*c=(void*)(long)(0x1000+d);return env("FAKE_RETAIN",0);}
int cuDevicePrimaryCtxRelease_v2(int d){return 0;}
int cuCtxPushCurrent_v2(void*c){return 0;}
int cuCtxPopCurrent_v2(void**c){*c=0;return 0;}
int cuCtxGetDevice(int*d){*d=0;return 0;}
int cuCtxSynchronize(void){return 0;}
int cuDeviceGetName(char*n,int l,int d){char b[32];sprintf(b,"FAKE_NAME%d",d);const char*v=getenv(b);strncpy(n,v?v:"NVIDIA H100 80GB HBM3",l);return 0;}
int cuDeviceGetAttribute(int*v,int a,int d){char b[32];sprintf(b,"FAKE_CC%d",d);int cc=env(b,90);
 if(a==75)*v=cc/10; else if(a==76)*v=cc%10; else if(a==16)*v=132; else if(a==88)*v=env("FAKE_PAGEABLE",0); else *v=0; return 0;}
int cuGetErrorString(int e,const char**s){*s= e==222?"the provided PTX was compiled with an unsupported toolchain.":e==100?"no CUDA-capable device is detected":e==101?"invalid device ordinal":e==803?"system has unsupported display driver / cuda driver combination":e==2?"out of memory":"error";return 0;}
int cuModuleLoadDataEx(void**m,const void*i,unsigned n,int*o,void**v){
 int need=83; const char*p=strstr((const char*)i,".version "); int maj=0,min=0; if(p)sscanf(p,".version %d.%d",&maj,&min);
 int d=env("FAKE_DRIVER",12080); int have= d>=13000?90: d>=12080?87: d>=12050?85: d>=12040?84: d>=12030?83: d>=12020?82: 80;
 if(maj*10+min>have){ char*log=(char*)v[0]; sprintf(log,"ptxas application ptx input, line 6; fatal   : Unsupported .version %d.%d; current version is '%d.%d'",maj,min,have/10,have%10); return 222;}
 *m=(void*)1; return 0;}
int cuModuleUnload(void*m){return 0;}
int cuModuleGetFunction(void**f,void*m,const char*n){*f=(void*)1;return 0;}
int cuFuncSetAttribute(void*f,int a,int v){return 0;}
int cuFuncLoad(void*f){return 0;}
int cuMemAlloc_v2(unsigned long long*p,size_t n){*p=0;return 2;}
int cuMemFree_v2(unsigned long long p){return 0;}
int cuMemGetInfo_v2(size_t*f,size_t*t){*f=0;*t=1<<30;return 0;}
static int foreign(unsigned long long a){return a>>52==0xbad;}
int cuPointerGetAttribute(void*v,int a,unsigned long long p){
 if(a==2){*(unsigned*)v=2;return p>>52==0xdad;} /* a kind of memory, which another context's has too */
 *(unsigned long long*)v=p;return foreign(p)||p>>52==0xdad;}
int pretend_launches=0;
int cuLaunchKernel(void*f,unsigned x,unsigned y,unsigned z,unsigned a,unsigned b,unsigned c,unsigned s,void*stream,void**p,void**e){
 if(foreign((unsigned long long)stream)) return 400; pretend_launches++; return 0;}
