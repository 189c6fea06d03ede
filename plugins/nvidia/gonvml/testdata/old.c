/* A stand-in for libnvidia-ml.so.1 of an old driver: one GPU, and none of the
 * functions that came later. Layouts are those of nvml.h. */
#include <string.h>

typedef void *device;

int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int r) { (void)r; return "stand-in"; }
int nvmlSystemGetDriverVersion(char *v, unsigned n) { strncpy(v, "390.157", n); return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, device *d) { *d = (device)1; return i == 0 ? 0 : 15; /* the other one is lost */ }
int nvmlDeviceGetUUID(device d, char *v, unsigned n) { (void)d; strncpy(v, "GPU-0", n); return 0; }
int nvmlDeviceGetName(device d, char *v, unsigned n) { (void)d; strncpy(v, "Quadro K620", n); return 0; }
int nvmlDeviceGetMinorNumber(device d, unsigned *v) { (void)d; *v = 0; return 0; }
int nvmlDeviceGetMemoryInfo(device d, unsigned long long *v) { (void)d; v[0] = 2ull << 30; v[1] = 1ull << 30; v[2] = 1ull << 30; return 0; }
int nvmlDeviceGetTemperature(device d, int s, unsigned *v) { (void)d; (void)s; *v = 40; return 0; }
int nvmlDeviceGetUtilizationRates(device d, unsigned *v) { (void)d; v[0] = 12; v[1] = 3; return 0; }
int nvmlDeviceGetPowerUsage(device d, unsigned *v) { (void)d; (void)v; return 3; /* not supported */ }

struct pci {
	char legacy[16];
	unsigned domain, bus, device, id, subsystem;
	char bus_id[32];
};

int nvmlDeviceGetPciInfo_v3(device d, struct pci *p) { (void)d; memset(p, 0, sizeof *p); strcpy(p->bus_id, "00000000:0A:00.0"); return 0; }
