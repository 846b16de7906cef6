/* Stands in for libnvidia-ml.so.1 where there is no GPU: two of them, by NVML's documented functions alone. The first
 * is busy 50 % and takes 250 W; the second idles, and knows neither its energy nor its clock, as some kinds do. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned long long total, free, used; } memory;

static int devices[2] = { 0, 1 };
static const char *says(const char *name) { const char *value = getenv(name); return value ? value : ""; }
static int lost(const int *device) { return says("STUB_LOST")[0] && *device == 0; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; return says("STUB_NO_DRIVER")[0] ? DRIVER_NOT_LOADED : OK; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int result) { return result == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "Unknown Error"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, int **device)
{
	if (index > 1)
		return INVALID_ARGUMENT;
	*device = &devices[index];
	return OK;
}

/* As on a node whose first board is /dev/nvidia3. */
int nvmlDeviceGetMinorNumber(int *device, unsigned *minor) { *minor = 3 - (unsigned)*device; return OK; }

int nvmlDeviceGetUUID(int *device, char *uuid, unsigned length)
{
	snprintf(uuid, length, "GPU-%d0000000-aaaa-bbbb-cccc-dddddddddddd", *device);
	return OK;
}

int nvmlDeviceGetUtilizationRates(int *device, utilization *found)
{
	while (says("STUB_HANGS")[0])
		nanosleep(&(struct timespec){ .tv_sec = 1 }, NULL);
	if (lost(device))
		return GPU_IS_LOST;
	*found = *device == 0 ? (utilization){ 50, 20 } : (utilization){ 0, 0 };
	return OK;
}

int nvmlDeviceGetMemoryInfo(int *device, memory *found)
{
	if (lost(device))
		return GPU_IS_LOST;
	*found = (memory){ .total = 80ULL << 30, .used = *device == 0 ? 20ULL << 30 : 0 };
	return OK;
}

int nvmlDeviceGetPowerUsage(int *device, unsigned *milliwatts)
{
	*milliwatts = *device == 0 ? 250000 : 60000;
	return lost(device) ? GPU_IS_LOST : OK;
}

int nvmlDeviceGetTotalEnergyConsumption(int *device, unsigned long long *millijoules)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	*millijoules = (unsigned long long)now.tv_sec * 250000 + (unsigned long long)now.tv_nsec / 4000;
	return *device == 0 && !lost(device) ? OK : NOT_SUPPORTED;
}

int nvmlDeviceGetTemperature(int *device, unsigned sensor, unsigned *celsius)
{
	*celsius = sensor == 0 ? 61 : 0;
	return lost(device) ? GPU_IS_LOST : OK;
}

int nvmlDeviceGetClockInfo(int *device, unsigned kind, unsigned *mhz)
{
	*mhz = kind == 1 ? 1980 : 0;
	return *device == 0 && !lost(device) ? OK : NOT_SUPPORTED;
}
