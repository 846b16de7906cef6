/* The port carrel.m.*: files of the kernel, read for the host's sampler. */
#ifndef CARREL_READOUT_H
#define CARREL_READOUT_H

/* Answers on fd until its other end is gone; returns this process's exit status. */
int readout_serve(int fd);

#endif
