// glibc_compat.h - bind to the oldest version of the few glibc symbols that got a newer one, so that a wheel built on a
// current system still loads on glibc 2.28 (manylinux_2_28). Force-included into every unit by meson.build; a test
// reads the versions back. The old entry points are the same functions: libpthread's moved into libc in 2.34, and
// the 2.29 exp and log only dropped the SVID error handling. (No header may come first: units choose their own feature
// macros.)
#ifndef PACE_GLIBC_COMPAT_H
#define PACE_GLIBC_COMPAT_H

#define PACE_OLD(name, version) __asm__(".symver " #name "," #name "@GLIBC_" #version)
PACE_OLD(exp, 2.2.5);
PACE_OLD(log, 2.2.5);
PACE_OLD(pthread_attr_setaffinity_np, 2.3.4);
PACE_OLD(pthread_attr_setstacksize, 2.2.5);
PACE_OLD(pthread_create, 2.2.5);
PACE_OLD(pthread_join, 2.2.5);
PACE_OLD(pthread_once, 2.2.5);
PACE_OLD(pthread_setname_np, 2.12);
PACE_OLD(pthread_sigmask, 2.2.5);
#undef PACE_OLD

#endif
